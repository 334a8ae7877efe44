// The product of a few vectors with a 2:4 matrix in the packed format of prox24/packed/_codes.py, by
// the sparse tensor cores of GPUs from Ampere on.
//
// For a batch of 8 or so the time is that of reading the matrix; beyond, x, which every block reads from
// the cache, is more than a block's part of it. A block of threads takes 16 rows, and its
// warps take turns at chunks of 64 inputs: every lane reads 16 bytes of two rows at once, and neighbours
// read what lies together. Nothing is made dense, and a value is read once. Sums are in float32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "fragments.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using prox24::CodesOf;
using prox24::InputOf;
using prox24::kChunk;
using prox24::kInstructions;
using prox24::kLaneValues;
using prox24::kRows;
using prox24::kVectors;
using prox24::PairOf;

constexpr int kWarps = 8;
constexpr int kLanes = 32;
constexpr int kInputsOfAWord = 32;

// d += a b on the sparse tensor cores; the lanes that give the codes are 2 kSelector and the next.
template <typename T, int kSelector>
__device__ __forceinline__ void MultiplyAdd(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[4], uint32_t codes) {
#define PROX24_MMA(TYPE)                                                                    \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE  \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "              \
               "{%0, %1, %2, %3}, %12, %13;"                                                \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),          \
                 "r"(b[2]), "r"(b[3]), "r"(codes), "n"(kSelector))
  if constexpr (std::is_same_v<T, __half>) {
    PROX24_MMA("f16");
  } else {
    PROX24_MMA("bf16");
  }
#undef PROX24_MMA
}

// kTiles tiles of 8 vectors; vectors from `batch` on are taken for zero.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kWarps* kLanes)
    Product(const T* __restrict__ x, const T* __restrict__ values,
            const uint32_t* __restrict__ codes, T* __restrict__ y, int batch, int64_t outputs,
            int64_t inputs) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int g = lane / 4, t = lane % 4;
  const int64_t row = int64_t{blockIdx.x} * kRows + g;
  const int64_t chunks = inputs / kChunk;

  const T* own_values[2];
  const uint32_t* own_codes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    own_values[half] = values + (row + 8 * half) * (inputs / 2) + t * kLaneValues;
    own_codes[half] = codes + (row + 8 * half) * (inputs / kInputsOfAWord);
  }

  float sums[kTiles][4] = {};
  // Two chunks at once keep more of memory's answers on the way, where there are registers for them.
#pragma unroll(kTiles < 8 ? 2 : 1)
  for (int64_t chunk = warp; chunk < chunks; chunk += kWarps) {
    uint32_t pairs[2][4];
    uint64_t bits[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 loaded =
          *reinterpret_cast<const uint4*>(own_values[half] + chunk * (kChunk / 2));
      pairs[half][0] = loaded.x;
      pairs[half][1] = loaded.y;
      pairs[half][2] = loaded.z;
      pairs[half][3] = loaded.w;
      const uint2 words =
          *reinterpret_cast<const uint2*>(own_codes[half] + chunk * (kChunk / kInputsOfAWord));
      bits[half] = uint64_t{words.y} << 32 | words.x;
    }
    const uint32_t own = CodesOf(bits[0], bits[1], t);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int vector = tile * kVectors + g;
      const T* inputs_of = x + vector * inputs + chunk * kChunk;
#pragma unroll
      for (int j = 0; j < kInstructions; ++j) {
        uint32_t a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = pairs[i % 2][PairOf(j, i)];
          b[i] = vector < batch ? *reinterpret_cast<const uint32_t*>(inputs_of + InputOf(j, i, t))
                                : 0;
        }
        if (j == 0) {
          MultiplyAdd<T, 0>(sums[tile], a, b, own);
        } else {
          MultiplyAdd<T, 1>(sums[tile], a, b, own);
        }
      }
    }
  }

  // Lane (g, t) has the sums of rows g and g + 8 and vectors 2 t and 2 t + 1 of every tile.
  __shared__ float partial[kWarps][kTiles * kVectors][kRows];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[warp][tile * kVectors + 2 * t + i % 2][g + 8 * (i / 2)] = sums[tile][i];
    }
  }
  __syncthreads();
  for (int place = threadIdx.x; place < kTiles * kVectors * kRows; place += kWarps * kLanes) {
    const int vector = place / kRows, of_row = place % kRows;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[w][vector][of_row];
    if (vector < batch) y[vector * outputs + int64_t{blockIdx.x} * kRows + of_row] = T(sum);
  }
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, const void* x, const void* values, const uint32_t* codes,
                   void* y, int64_t batch, int64_t outputs, int64_t inputs) {
  const auto launch = [&](auto kernel) {
    kernel<<<outputs / kRows, kWarps * kLanes, 0, stream>>>(
        static_cast<const T*>(x), static_cast<const T*>(values), codes, static_cast<T*>(y),
        static_cast<int>(batch), outputs, inputs);
    return cudaGetLastError();
  };
  if (batch <= 1 * kVectors) return launch(Product<T, 1>);
  if (batch <= 2 * kVectors) return launch(Product<T, 2>);
  if (batch <= 4 * kVectors) return launch(Product<T, 4>);
  return launch(Product<T, 8>);
}

ffi::Error Matmul(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::U32> codes, ffi::Result<ffi::AnyBuffer> y) {
  const auto of_x = x.dimensions(), of_values = values.dimensions(), of_codes = codes.dimensions();
  if (of_x.size() != 2 || of_values.size() != 2 || of_codes.size() != 2 ||
      of_codes[0] != of_values[0] || of_values[1] * 2 != of_x[1] ||
      of_codes[1] * kInputsOfAWord != of_x[1] || of_x[1] % kChunk || of_values[0] % kRows ||
      of_x[0] > 8 * kVectors || x.element_type() != values.element_type() ||
      y->element_type() != x.element_type() ||
      static_cast<int64_t>(y->element_count()) != of_x[0] * of_codes[0])
    return ffi::Error::InvalidArgument("prox24_matmul_cuda: shapes or dtypes do not fit");
  const auto launch = [&](auto type) {
    using T = decltype(type);
    const cudaError_t error = Launch<T>(stream, x.untyped_data(), values.untyped_data(),
                                        codes.typed_data(), y->untyped_data(), of_x[0],
                                        of_codes[0], of_x[1]);
    if (error == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(cudaGetErrorString(error));
  };
  switch (x.element_type()) {
    case ffi::DataType::F16: return launch(__half{});
    case ffi::DataType::BF16: return launch(__nv_bfloat16{});
    default: return ffi::Error::InvalidArgument("prox24_matmul_cuda: only float16 and bfloat16");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(prox24_matmul_cuda, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::AnyBuffer>());
