// What prox24/packed/_kernels/cusparselt.cc calls of cuSPARSELt, as its documentation has it, for
// bfloat16 in the memory of the host: descriptors say how matrices lie; nothing is asynchronous.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

typedef struct CUstream_st* cudaStream_t;
typedef enum { CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType;
typedef enum { MAJOR_VERSION, MINOR_VERSION } libraryPropertyType;
typedef enum {
  CUSPARSE_STATUS_SUCCESS = 0,
  CUSPARSE_STATUS_ALLOC_FAILED = 2,
  CUSPARSE_STATUS_INVALID_VALUE = 3,
  CUSPARSE_STATUS_NOT_SUPPORTED = 10
} cusparseStatus_t;
typedef enum { CUSPARSE_OPERATION_NON_TRANSPOSE, CUSPARSE_OPERATION_TRANSPOSE } cusparseOperation_t;
typedef enum { CUSPARSE_ORDER_COL = 1, CUSPARSE_ORDER_ROW = 2 } cusparseOrder_t;
typedef enum { CUSPARSELT_SPARSITY_50_PERCENT } cusparseLtSparsity_t;
typedef enum { CUSPARSE_COMPUTE_32F } cusparseComputeType;
typedef enum { CUSPARSELT_MATMUL_ALG_DEFAULT } cusparseLtMatmulAlg_t;

struct cusparseLtHandle_t {
  int opened;
};
struct cusparseLtMatDescriptor_t {
  int64_t rows, cols, ld;
  cudaDataType type;
  cusparseOrder_t order;
  bool sparse;
};
struct cusparseLtMatmulDescriptor_t {
  bool transposed;
  const cusparseLtMatDescriptor_t *a, *b, *d;
};
struct cusparseLtMatmulAlgSelection_t {
  const cusparseLtMatmulDescriptor_t* product;
};
struct cusparseLtMatmulPlan_t {
  const cusparseLtMatmulDescriptor_t* product;
};

#define CUSPARSELT_VER_MAJOR 0
#define CUSPARSELT_VER_MINOR 10

inline int initialized = 0, planned = 0, minor_release = CUSPARSELT_VER_MINOR;
constexpr size_t kWorkspace = 24, kCompressing = 40;

inline cusparseStatus_t ValidIf(bool valid) {
  return valid ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}

inline const char* cusparseLtGetErrorString(cusparseStatus_t) { return "failed"; }

inline cusparseStatus_t cusparseLtGetProperty(libraryPropertyType type, int* value) {
  *value = type == MAJOR_VERSION ? CUSPARSELT_VER_MAJOR : minor_release;
  return CUSPARSE_STATUS_SUCCESS;
}

inline cusparseStatus_t cusparseLtInit(cusparseLtHandle_t* handle) {
  handle->opened = ++initialized;
  return CUSPARSE_STATUS_SUCCESS;
}

inline cusparseStatus_t Describe(const cusparseLtHandle_t* handle, uint32_t alignment,
                                 cusparseLtMatDescriptor_t* made, cusparseLtMatDescriptor_t m) {
  const int64_t multiple = m.sparse ? 16 : 8;
  *made = m;
  return ValidIf(handle->opened && m.rows % multiple == 0 && m.cols % multiple == 0 &&
                 m.ld >= (m.order == CUSPARSE_ORDER_ROW ? m.cols : m.rows) && alignment == 16);
}

inline cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t* handle,
                                                      cusparseLtMatDescriptor_t* made, int64_t rows,
                                                      int64_t cols, int64_t ld, uint32_t alignment,
                                                      cudaDataType type, cusparseOrder_t order) {
  return Describe(handle, alignment, made, {rows, cols, ld, type, order, false});
}

inline cusparseStatus_t cusparseLtStructuredDescriptorInit(
    const cusparseLtHandle_t* handle, cusparseLtMatDescriptor_t* made, int64_t rows, int64_t cols,
    int64_t ld, uint32_t alignment, cudaDataType type, cusparseOrder_t order,
    cusparseLtSparsity_t) {
  return Describe(handle, alignment, made, {rows, cols, ld, type, order, true});
}

inline cusparseStatus_t cusparseLtMatmulDescriptorInit(
    const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* made, cusparseOperation_t of_a,
    cusparseOperation_t of_b, const cusparseLtMatDescriptor_t* a,
    const cusparseLtMatDescriptor_t* b, const cusparseLtMatDescriptor_t* c,
    const cusparseLtMatDescriptor_t* d, cusparseComputeType) {
  const bool transposed = of_b == CUSPARSE_OPERATION_TRANSPOSE;
  *made = {transposed, a, b, d};
  // Of the structured matrix, the one form that is computed here.
  return ValidIf(a->sparse && a->order == CUSPARSE_ORDER_ROW &&
                 of_a == CUSPARSE_OPERATION_NON_TRANSPOSE && d->rows == a->rows &&
                 a->cols == (transposed ? b->cols : b->rows) &&
                 d->cols == (transposed ? b->rows : b->cols) && a->type == CUDA_R_16BF &&
                 b->type == a->type && d->type == a->type && !std::memcmp(c, d, sizeof(*c)));
}

inline cusparseStatus_t cusparseLtMatmulAlgSelectionInit(
    const cusparseLtHandle_t*, cusparseLtMatmulAlgSelection_t* made,
    const cusparseLtMatmulDescriptor_t* product, cusparseLtMatmulAlg_t) {
  *made = {product};
  return CUSPARSE_STATUS_SUCCESS;
}

inline cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t*,
                                                 cusparseLtMatmulPlan_t* made,
                                                 const cusparseLtMatmulDescriptor_t* product,
                                                 const cusparseLtMatmulAlgSelection_t* algorithm) {
  *made = {product};
  ++planned;
  return ValidIf(algorithm->product == product);
}

inline cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t*,
                                                     const cusparseLtMatmulPlan_t*, size_t* size) {
  *size = kWorkspace;
  return CUSPARSE_STATUS_SUCCESS;
}

struct Block {
  uint16_t values[2];
  uint8_t places[2];
};

inline cusparseStatus_t cusparseLtSpMMACompressedSize(const cusparseLtHandle_t*,
                                                      const cusparseLtMatmulPlan_t* plan,
                                                      size_t* compressed, size_t* compressing) {
  *compressed = plan->product->a->rows * plan->product->a->cols / 4 * sizeof(Block);
  *compressing = kCompressing;
  return CUSPARSE_STATUS_SUCCESS;
}

inline cusparseStatus_t cusparseLtSpMMACompress(const cusparseLtHandle_t*,
                                                const cusparseLtMatmulPlan_t* plan,
                                                const void* dense, void* compressed,
                                                void* compressing, cudaStream_t) {
  const auto* a = plan->product->a;
  auto* block = static_cast<Block*>(compressed);
  std::memset(compressing, 1, kCompressing);
  for (int64_t i = 0; i < a->rows; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(dense) + i * a->ld;
    for (int64_t j = 0; j < a->cols; j += 4, ++block) {
      *block = {};
      int kept = 0;
      for (uint8_t k = 0; k < 4; ++k) {
        if (!(row[j + k] & 0x7fff)) continue;  // a zero of either sign
        if (kept == 2) return CUSPARSE_STATUS_INVALID_VALUE;
        block->values[kept] = row[j + k];
        block->places[kept++] = k;
      }
    }
  }
  return CUSPARSE_STATUS_SUCCESS;
}

inline float Wide(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline uint16_t Narrow(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline int64_t At(const cusparseLtMatDescriptor_t* m, int64_t row, int64_t column) {
  return m->order == CUSPARSE_ORDER_ROW ? row * m->ld + column : column * m->ld + row;
}

inline cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t*,
                                         const cusparseLtMatmulPlan_t* plan, const void* alpha,
                                         const void* compressed, const void* b, const void* beta,
                                         const void* c, void* d, void* workspace,
                                         cudaStream_t* streams, int32_t count) {
  const auto [transposed, of_a, of_b, of_d] = *plan->product;
  if (*static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0 || c != d ||
      streams == nullptr || count != 1)
    return CUSPARSE_STATUS_INVALID_VALUE;
  std::memset(workspace, 1, kWorkspace);
  const int64_t blocks = of_a->cols / 4;
  for (int64_t i = 0; i < of_d->rows; ++i)
    for (int64_t j = 0; j < of_d->cols; ++j) {
      const Block* row = static_cast<const Block*>(compressed) + i * blocks;
      float sum = 0;
      for (int64_t k = 0; k < blocks; ++k)
        for (int n = 0; n < 2; ++n) {
          const int64_t inner = 4 * k + row[k].places[n];
          const int64_t at = transposed ? At(of_b, j, inner) : At(of_b, inner, j);
          sum += Wide(row[k].values[n]) * Wide(static_cast<const uint16_t*>(b)[at]);
        }
      static_cast<uint16_t*>(d)[At(of_d, i, j)] = Narrow(sum);
    }
  return CUSPARSE_STATUS_SUCCESS;
}
