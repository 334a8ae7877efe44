// One tile of what kernels/cuda.cu computes, 8 vectors, on a CPU: mma.sp.m16n8k32 is done by the layouts
// of the PTX ISA, from what every lane would hold by fragments.h. How the kernel stores the sums, and
// adds those of its warps, is not done here.

#include <cstdint>
#include <cstring>

#include "fragments.h"

namespace {

using namespace prox24;

struct Lane {
  float a[kInstructions][4][2];
  float b[kInstructions][4][2];
  uint32_t codes;
};

Lane Load(const float* x, const float* values, const uint32_t* codes, int64_t row, int64_t inputs,
          int64_t chunk, int lane) {
  const int g = lane / 4, t = lane % 4;
  Lane held;
  uint64_t bits[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t own = row + g + 8 * half;
    std::memcpy(&bits[half], codes + own * inputs / 32 + 2 * chunk, sizeof(uint64_t));
    const float* pairs = values + own * inputs / 2 + chunk * kChunk / 2 + t * kLaneValues;
    for (int j = 0; j < kInstructions; ++j)
      for (int i = half; i < 4; i += 2)
        std::memcpy(held.a[j][i], pairs + 2 * PairOf(j, i), sizeof(held.a[j][i]));
  }
  for (int j = 0; j < kInstructions; ++j)
    for (int i = 0; i < 4; ++i)
      std::memcpy(held.b[j][i], x + g * inputs + chunk * kChunk + InputOf(j, i, t),
                  sizeof(held.b[j][i]));
  held.codes = CodesOf(bits[0], bits[1], t);
  return held;
}

void MultiplyAdd(const Lane (&lanes)[32], int instruction, double (&sums)[kRows][kVectors]) {
  float b[32][kVectors], compressed[kRows][16];
  int blocks[kRows][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 2; ++k) {
        compressed[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + k] = lanes[lane].a[instruction][i][k];
        b[8 * i + 2 * t + k][g] = lanes[lane].b[instruction][i][k];
      }
  }
  for (int row = 0; row < kRows; ++row)
    for (int block = 0; block < 8; ++block) {
      const Lane& giver = lanes[4 * (row % 8) + 2 * instruction + block / 4];  // of the selector
      blocks[row][block] = giver.codes >> (16 * (row / 8) + 4 * (block % 4)) & 15;
    }
  for (int row = 0; row < kRows; ++row)
    for (int block = 0; block < 8; ++block)
      for (int k = 0; k < 2; ++k) {
        const int input = 4 * block + (blocks[row][block] >> (2 * k) & 3);
        for (int vector = 0; vector < kVectors; ++vector)
          sums[row][vector] += double{compressed[row][2 * block + k]} * b[input][vector];
      }
}

}  // namespace

// y (8, outputs) = x (8, inputs) W^T.
extern "C" __attribute__((visibility("default"))) void emulate(const float* x, const float* values, const uint32_t* codes, double* y,
                        int64_t outputs, int64_t inputs) {
  for (int64_t row = 0; row < outputs; row += kRows) {
    double sums[kRows][kVectors] = {};
    for (int64_t chunk = 0; chunk < inputs / kChunk; ++chunk) {
      Lane lanes[32];
      for (int lane = 0; lane < 32; ++lane)
        lanes[lane] = Load(x, values, codes, row, inputs, chunk, lane);
      for (int j = 0; j < kInstructions; ++j) MultiplyAdd(lanes, j, sums);
    }
    for (int r = 0; r < kRows; ++r)
      for (int vector = 0; vector < kVectors; ++vector)
        y[vector * outputs + row + r] = sums[r][vector];
  }
}
