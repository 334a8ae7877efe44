// The product of a few vectors with a 2:4 matrix in the packed format of prox24/packed/_codes.py.
//
// For a small batch the time is that of reading the matrix, so a kernel reads the packed one and
// makes nothing dense: a word of codes becomes the lanes of a permutation, which picks from 32
// inputs the 16 that are multiplied. Four rows share the inputs that are loaded, and a group of rows
// stays in the cache while vector after vector is multiplied with it. Sums are in float32.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f")))
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kInputs = 32;  // that a word of codes tells of
constexpr int64_t kValues = 16;
constexpr int64_t kRows = 4;

struct BFloat16 {
  uint16_t bits;
};

float ToFloat(float value) { return value; }

float ToFloat(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

void Round(float value, float* result) { *result = value; }

// To the nearest, ties to even.
void Round(float value, BFloat16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  result->bits = static_cast<uint16_t>(rounded >> 16);
}

template <typename T>
struct Product {
  const float* x;  // (batch, 32 words), prepared
  const T* values;  // (outputs, 16 words)
  const uint32_t* codes;  // (outputs, words)
  T* y;  // (batch, outputs)
  int64_t batch, outputs, words;
};

// Each kernel multiplies `rows` rows of the matrix, from `row` on, with the whole batch.
template <typename T>
using Kernel = void (*)(const Product<T>&, int64_t row, int64_t rows);

template <typename T>
void Portable(const Product<T>& p, int64_t row, int64_t rows) {
  for (int64_t r = row; r < row + rows; ++r) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const float* x = p.x + b * p.words * kInputs;
      const T* values = p.values + r * p.words * kValues;
      float sums[8] = {};
      for (int64_t w = 0; w < p.words; ++w, x += kInputs, values += kValues) {
        const uint32_t codes = p.codes[r * p.words + w];
        for (int i = 0; i < 8; ++i) {
          const uint32_t code = codes >> (4 * i);
          sums[i] += ToFloat(values[2 * i]) * x[4 * i + (code & 3)] +
                     ToFloat(values[2 * i + 1]) * x[4 * i + (code >> 2 & 3)];
        }
      }
      const float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                        ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      Round(sum, &p.y[b * p.outputs + r]);
    }
  }
}

#if defined(__x86_64__)

AVX512 inline __m512 Load16(const float* values) { return _mm512_loadu_ps(values); }

AVX512 inline __m512 Load16(const BFloat16* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <typename T, int kTall, int kBatch>
AVX512 void TileAvx512(const Product<T>& p, int64_t row, int64_t vector) {
  // Lane l looks at the bits from 2 l on, within the block l / 2.
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i starts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i place = _mm512_set1_epi32(3);
  const float* x = p.x + vector * p.words * kInputs;
  const T* values = p.values + row * p.words * kValues;
  const uint32_t* codes = p.codes + row * p.words;
  __m512 sums[kTall][kBatch];
  UNROLL for (int r = 0; r < kTall; ++r)
    UNROLL for (int b = 0; b < kBatch; ++b) sums[r][b] = _mm512_setzero_ps();
  for (int64_t w = 0; w < p.words; ++w) {
    __m512i index[kTall];
    __m512 value[kTall];
    UNROLL for (int r = 0; r < kTall; ++r) {
      const __m512i word = _mm512_set1_epi32(static_cast<int>(codes[r * p.words + w]));
      // (word >> shifts & place) | starts
      index[r] = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(word, shifts), place, starts, 0xEA);
      value[r] = Load16(values + (r * p.words + w) * kValues);
    }
    UNROLL for (int b = 0; b < kBatch; ++b) {
      const float* here = x + (b * p.words + w) * kInputs;
      const __m512 low = _mm512_loadu_ps(here), high = _mm512_loadu_ps(here + 16);
      UNROLL for (int r = 0; r < kTall; ++r)
        sums[r][b] = _mm512_fmadd_ps(value[r], _mm512_permutex2var_ps(low, index[r], high), sums[r][b]);
    }
  }
  UNROLL for (int r = 0; r < kTall; ++r)
    UNROLL for (int b = 0; b < kBatch; ++b)
      Round(_mm512_reduce_add_ps(sums[r][b]), &p.y[(vector + b) * p.outputs + row + r]);
}

template <typename T, int kTall>
AVX512 void GroupAvx512(const Product<T>& p, int64_t row) {
  int64_t b = 0;
  for (; b + 4 <= p.batch; b += 4) TileAvx512<T, kTall, 4>(p, row, b);
  switch (p.batch - b) {
    case 3: return TileAvx512<T, kTall, 3>(p, row, b);
    case 2: return TileAvx512<T, kTall, 2>(p, row, b);
    case 1: return TileAvx512<T, kTall, 1>(p, row, b);
  }
}

template <typename T>
AVX512 void Avx512(const Product<T>& p, int64_t row, int64_t rows) {
  const int64_t end = row + rows;
  for (; row + kRows <= end; row += kRows) GroupAvx512<T, kRows>(p, row);
  for (; row < end; ++row) GroupAvx512<T, 1>(p, row);
}

AVX2 inline __m256 Load8(const float* values) { return _mm256_loadu_ps(values); }

AVX2 inline __m256 Load8(const BFloat16* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

AVX2 inline float Sum(__m256 lanes) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// A permutation within four lanes needs no more of a code than its place. Of four blocks A, B, C, D
// the first registers holds A and C, the second B and D, as `Prepare` has put them.
template <typename T, int kTall, int kBatch>
AVX2 void TileAvx2(const Product<T>& p, int64_t row, int64_t vector) {
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const float* x = p.x + vector * p.words * kInputs;
  const T* values = p.values + row * p.words * kValues;
  const uint32_t* codes = p.codes + row * p.words;
  __m256 sums[kTall][kBatch];
  UNROLL for (int r = 0; r < kTall; ++r)
    UNROLL for (int b = 0; b < kBatch; ++b) sums[r][b] = _mm256_setzero_ps();
  for (int64_t w = 0; w < p.words; ++w) {
    for (int half = 0; half < 2; ++half) {
      __m256i index[kTall];
      __m256 value[kTall];
      UNROLL for (int r = 0; r < kTall; ++r) {
        const uint32_t word = codes[r * p.words + w] >> (16 * half);
        index[r] = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts);
        value[r] = Load8(values + (r * p.words + w) * kValues + 8 * half);
      }
      UNROLL for (int b = 0; b < kBatch; ++b) {
        const float* here = x + (b * p.words + w) * kInputs + 16 * half;
        const __m256 even = _mm256_loadu_ps(here), odd = _mm256_loadu_ps(here + 8);
        UNROLL for (int r = 0; r < kTall; ++r) {
          const __m256 picked = _mm256_blend_ps(_mm256_permutevar_ps(even, index[r]),
                                                _mm256_permutevar_ps(odd, index[r]), 0xCC);
          sums[r][b] = _mm256_fmadd_ps(value[r], picked, sums[r][b]);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < kTall; ++r)
    UNROLL for (int b = 0; b < kBatch; ++b)
      Round(Sum(sums[r][b]), &p.y[(vector + b) * p.outputs + row + r]);
}

template <typename T, int kTall>
AVX2 void GroupAvx2(const Product<T>& p, int64_t row) {
  int64_t b = 0;
  for (; b + 2 <= p.batch; b += 2) TileAvx2<T, kTall, 2>(p, row, b);
  if (b < p.batch) TileAvx2<T, kTall, 1>(p, row, b);
}

template <typename T>
AVX2 void Avx2(const Product<T>& p, int64_t row, int64_t rows) {
  const int64_t end = row + rows;
  for (; row + kRows <= end; row += kRows) GroupAvx2<T, kRows>(p, row);
  for (; row < end; ++row) GroupAvx2<T, 1>(p, row);
}

#endif  // __x86_64__

// The forms of the kernel, as cpu.py numbers them.
enum Instructions { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Instructions Supported() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

template <typename T>
Kernel<T> KernelOf(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions == kAvx512) return Avx512<T>;
  if (instructions == kAvx2) return Avx2<T>;
#endif
  return Portable<T>;
}

// The inputs in float32, in the order in which the kernel takes them.
template <typename T>
void Prepare(const T* x, int64_t count, Instructions instructions, float* prepared) {
  if (instructions != kAvx2) {
    for (int64_t i = 0; i < count; ++i) prepared[i] = ToFloat(x[i]);
    return;
  }
  constexpr int kBlocks[4] = {0, 2, 1, 3};
  for (int64_t i = 0; i < count; i += 16)
    for (int block = 0; block < 4; ++block)
      for (int j = 0; j < 4; ++j) prepared[i + 4 * block + j] = ToFloat(x[i + 4 * kBlocks[block] + j]);
}

// Parts of a job, which threads take one after the other. The caller takes parts too, and waits only
// for those that another thread has begun: it may be itself one of the pool, all of which wait.
template <typename T>
struct Job {
  Product<T> product;
  Kernel<T> kernel;
  int64_t rows, parts;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  int64_t done = 0;

  void TakeParts() {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) {
      const int64_t row = part * rows;
      kernel(product, row, std::min(rows, product.outputs - row));
      std::lock_guard<std::mutex> lock(mutex);
      if (++done == parts) finished.notify_all();
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done == parts; });
  }
};

constexpr int64_t kBytesOfAThread = 1 << 17;  // less is read sooner than a thread wakes
constexpr int64_t kPartsOfAThread = 8;

template <typename T>
void Multiply(ffi::ThreadPool& pool, const T* x, const T* values, const uint32_t* codes, T* y,
              int64_t batch, int64_t outputs, int64_t words, Instructions instructions) {
  if (batch == 0 || outputs == 0) return;
  std::vector<float> prepared(batch * words * kInputs);
  Prepare(x, static_cast<int64_t>(prepared.size()), instructions, prepared.data());
  const int64_t work = outputs * words * kValues * static_cast<int64_t>(sizeof(T)) * batch;
  const int64_t threads =
      std::clamp<int64_t>(work / kBytesOfAThread, 1, std::max<int64_t>(pool.num_threads(), 1));
  auto job = std::make_shared<Job<T>>();
  job->product = {prepared.data(), values, codes, y, batch, outputs, words};
  job->kernel = KernelOf<T>(instructions);
  const int64_t parts = threads == 1 ? 1 : threads * kPartsOfAThread;
  job->rows = (outputs + parts * kRows - 1) / (parts * kRows) * kRows;
  job->parts = (outputs + job->rows - 1) / job->rows;
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([job] { job->TakeParts(); });
  job->TakeParts();
  job->Wait();
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::U32> codes, ffi::Result<ffi::AnyBuffer> y, int32_t instructions) {
  const auto of_x = x.dimensions(), of_values = values.dimensions(), of_codes = codes.dimensions();
  if (of_x.size() != 2 || of_values.size() != 2 || of_codes.size() != 2 ||
      of_codes[0] != of_values[0] || of_values[1] != of_codes[1] * kValues ||
      of_x[1] != of_codes[1] * kInputs || x.element_type() != values.element_type() ||
      y->element_type() != x.element_type() ||
      static_cast<int64_t>(y->element_count()) != of_x[0] * of_codes[0])
    return ffi::Error::InvalidArgument("prox24_matmul: shapes or dtypes do not fit");
  const int64_t batch = of_x[0], outputs = of_codes[0], words = of_codes[1];
  const Instructions used = static_cast<Instructions>(
      std::clamp<int32_t>(instructions, kPortable, static_cast<int32_t>(Supported())));
  const auto multiply = [&](auto type) {
    using T = decltype(type);
    Multiply<T>(pool, static_cast<const T*>(x.untyped_data()),
                static_cast<const T*>(values.untyped_data()), codes.typed_data(),
                static_cast<T*>(y->untyped_data()), batch, outputs, words, used);
    return ffi::Error::Success();
  };
  switch (x.element_type()) {
    case ffi::DataType::F32: return multiply(float{});
    case ffi::DataType::BF16: return multiply(BFloat16{});
    default: return ffi::Error::InvalidArgument("prox24_matmul: only float32 and bfloat16");
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* prox24_matmul(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(prox24_matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("instructions"));
