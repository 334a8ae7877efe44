// The product of many vectors with a dense matrix that is 2:4, by cuSPARSELt, NVIDIA's library for
// sparse tensor cores.
//
// Its compressed form is its own, and depends on the plan of a product, so every call compresses
// the matrix: reads it once and writes 9/16 of it. Plans are kept until the process ends.

#include <cusparseLt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr uint32_t kAlignment = 16;
constexpr int64_t kWeightMultiple = 16, kBatchMultiple = 8;

#define PROX24_RETURN_IF_FAILED(CALL) \
  if (const cusparseStatus_t status = (CALL); status != CUSPARSE_STATUS_SUCCESS) return status

// Device, type, outputs, inputs, batch.
using Case = std::tuple<int32_t, cudaDataType, int64_t, int64_t, int64_t>;

// Its parts point at one another, so it stays in its place.
struct Plan {
  cusparseLtMatDescriptor_t weight, x, y;
  cusparseLtMatmulDescriptor_t product;
  cusparseLtMatmulAlgSelection_t algorithm;
  cusparseLtMatmulPlan_t plan;
  size_t compressed, compressing, workspace;
};

// y^T = W x^T, where y^T, column after column, is y, row after row.
cusparseStatus_t Make(const cusparseLtHandle_t* handle, const Case& wanted, Plan* made) {
  const auto [device, type, outputs, inputs, batch] = wanted;
  PROX24_RETURN_IF_FAILED(cusparseLtStructuredDescriptorInit(
      handle, &made->weight, outputs, inputs, inputs, kAlignment, type, CUSPARSE_ORDER_ROW,
      CUSPARSELT_SPARSITY_50_PERCENT));
  PROX24_RETURN_IF_FAILED(cusparseLtDenseDescriptorInit(handle, &made->x, batch, inputs, inputs,
                                                        kAlignment, type, CUSPARSE_ORDER_ROW));
  PROX24_RETURN_IF_FAILED(cusparseLtDenseDescriptorInit(handle, &made->y, outputs, batch, outputs,
                                                        kAlignment, type, CUSPARSE_ORDER_COL));
  PROX24_RETURN_IF_FAILED(cusparseLtMatmulDescriptorInit(
      handle, &made->product, CUSPARSE_OPERATION_NON_TRANSPOSE, CUSPARSE_OPERATION_TRANSPOSE,
      &made->weight, &made->x, &made->y, &made->y, CUSPARSE_COMPUTE_32F));
  PROX24_RETURN_IF_FAILED(cusparseLtMatmulAlgSelectionInit(handle, &made->algorithm, &made->product,
                                                           CUSPARSELT_MATMUL_ALG_DEFAULT));
  PROX24_RETURN_IF_FAILED(
      cusparseLtMatmulPlanInit(handle, &made->plan, &made->product, &made->algorithm));
  PROX24_RETURN_IF_FAILED(cusparseLtMatmulGetWorkspace(handle, &made->plan, &made->workspace));
  return cusparseLtSpMMACompressedSize(handle, &made->plan, &made->compressed, &made->compressing);
}

// Whether the library that is loaded, which PyTorch may have brought, is of the release that was
// compiled against: its structures have the sizes of that one.
bool IsOfThisRelease() {
  int release[2];
  return cusparseLtGetProperty(MAJOR_VERSION, &release[0]) == CUSPARSE_STATUS_SUCCESS &&
         cusparseLtGetProperty(MINOR_VERSION, &release[1]) == CUSPARSE_STATUS_SUCCESS &&
         release[0] == CUSPARSELT_VER_MAJOR && release[1] == CUSPARSELT_VER_MINOR;
}

std::mutex planning;
std::map<int32_t, std::unique_ptr<cusparseLtHandle_t>> handles;
std::map<Case, std::unique_ptr<Plan>> plans;

cusparseStatus_t Find(const Case& wanted, const cusparseLtHandle_t** handle, const Plan** plan) {
  const std::lock_guard<std::mutex> lock(planning);
  auto& opened = handles[std::get<0>(wanted)];
  if (opened == nullptr) {
    if (!IsOfThisRelease()) return CUSPARSE_STATUS_NOT_SUPPORTED;
    auto opening = std::make_unique<cusparseLtHandle_t>();
    PROX24_RETURN_IF_FAILED(cusparseLtInit(opening.get()));
    opened = std::move(opening);
  }
  auto& kept = plans[wanted];
  if (kept == nullptr) {
    auto made = std::make_unique<Plan>();
    PROX24_RETURN_IF_FAILED(Make(opened.get(), wanted, made.get()));
    kept = std::move(made);
  }
  *handle = opened.get();
  *plan = kept.get();
  return CUSPARSE_STATUS_SUCCESS;
}

// y = x W^T, with x (batch, inputs), W (outputs, inputs) and y (batch, outputs), row after row on
// the device; `allocate` gives device memory that lives until the stream has used it, or nothing.
template <typename Allocate>
cusparseStatus_t Multiply(const Case& wanted, const void* x, const void* weight, void* y,
                          cudaStream_t stream, Allocate allocate) {
  const cusparseLtHandle_t* handle;
  const Plan* plan;
  PROX24_RETURN_IF_FAILED(Find(wanted, &handle, &plan));
  void* memory[3];
  const size_t sizes[] = {plan->compressed, plan->compressing, plan->workspace};
  for (int i = 0; i < 3; ++i) {
    const std::optional<void*> given = sizes[i] ? allocate(sizes[i]) : nullptr;
    if (!given.has_value()) return CUSPARSE_STATUS_ALLOC_FAILED;
    memory[i] = *given;
  }
  PROX24_RETURN_IF_FAILED(cusparseLtSpMMACompress(handle, &plan->plan, weight, memory[0], memory[1],
                                                  stream));
  const float one = 1, zero = 0;
  return cusparseLtMatmul(handle, &plan->plan, &one, memory[0], x, &zero, y, y, memory[2], &stream,
                          1);
}

ffi::Error Matmul(cudaStream_t stream, int32_t device, ffi::ScratchAllocator scratch,
                  ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> y) {
  const auto of_x = x.dimensions(), of_weight = weight.dimensions();
  if (of_x.size() != 2 || of_weight.size() != 2 || of_weight[1] != of_x[1] ||
      of_weight[0] % kWeightMultiple || of_weight[1] % kWeightMultiple ||
      of_x[0] % kBatchMultiple || x.element_type() != weight.element_type() ||
      y->element_type() != x.element_type() ||
      static_cast<int64_t>(y->element_count()) != of_x[0] * of_weight[0])
    return ffi::Error::InvalidArgument("prox24_matmul_cusparselt: shapes or dtypes do not fit");
  cudaDataType type;
  switch (x.element_type()) {
    case ffi::DataType::F16: type = CUDA_R_16F; break;
    case ffi::DataType::BF16: type = CUDA_R_16BF; break;
    default:
      return ffi::Error::InvalidArgument("prox24_matmul_cusparselt: only float16 and bfloat16");
  }
  const cusparseStatus_t status =
      Multiply({device, type, of_weight[0], of_weight[1], of_x[0]}, x.untyped_data(),
               weight.untyped_data(), y->untyped_data(), stream,
               [&](size_t size) { return scratch.Allocate(size); });
  if (status == CUSPARSE_STATUS_SUCCESS) return ffi::Error::Success();
  if (!IsOfThisRelease())
    return ffi::Error::Internal("another release of cuSPARSELt is loaded than compiled against");
  return ffi::Error::Internal(cusparseLtGetErrorString(status));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* prox24_matmul_cusparselt(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(prox24_matmul_cusparselt, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
