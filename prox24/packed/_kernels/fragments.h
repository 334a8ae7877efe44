// Which parts of a packed 2:4 matrix and of the vectors each lane of a warp holds for `mma.sp`.
//
// mma.sp.m16n8k32 multiplies 16 rows of a 2:4 matrix with 8 vectors, over 32 inputs. Of a group of
// four lanes, the group g = lane / 4 holds rows g and g + 8 and vector g. In one row, lane t of the
// group holds the values of two blocks of four inputs, t and t + 4 of eight, and lanes 0 and 1 (or
// 2 and 3, by the selector) hold the codes: those of blocks 0 to 3 and of blocks 4 to 7 of both rows,
// row g in the lower half of a register. (PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with
// .f16 and .bf16 types".)
//
// The order of the inputs is free, as long as matrix and vectors have the same. Here two
// instructions take 64 inputs, and lane t holds blocks 4 t to 4 t + 3 of sixteen: eight values, which
// it loads at once. Instruction j multiplies blocks 4 t + 2 j and 4 t + 2 j + 1 as its blocks t and
// t + 4. Every lane then needs one register of codes, the t-th of every four blocks, which is read by
// instruction t / 2.
//
// The same functions serve the kernel and a test, which does on a CPU what the instruction does.

#ifndef PROX24_PACKED_FRAGMENTS_H_
#define PROX24_PACKED_FRAGMENTS_H_

#include <cstdint>

#ifdef __CUDACC__
#define PROX24_BOTH __host__ __device__ __forceinline__
#else
#define PROX24_BOTH inline
#endif

namespace prox24 {

constexpr int kInstructions = 2;
constexpr int kChunk = 64;        // inputs that they take together
constexpr int kLaneValues = 8;    // of a row and a chunk that a lane loads
constexpr int kRows = 16;
constexpr int kVectors = 8;

// The codes that lane t gives, of the 64 bits of a chunk in row g and in row g + 8.
PROX24_BOTH uint32_t CodesOf(uint64_t row, uint64_t row_plus_8, int t) {
  uint32_t codes = 0;
  for (int i = 0; i < 4; ++i) {
    const int place = 16 * i + 4 * t;
    codes |= static_cast<uint32_t>((row >> place) & 15) << (4 * i);
    codes |= static_cast<uint32_t>((row_plus_8 >> place) & 15) << (16 + 4 * i);
  }
  return codes;
}

// The first of the two inputs of a chunk that register i of lane t holds of a vector, for an
// instruction: inputs 8 i + 2 t and the next of its 32.
PROX24_BOTH int InputOf(int instruction, int i, int t) {
  const int block = 4 * (2 * (i & 1) + t / 2) + 2 * instruction + i / 2;
  return 4 * block + 2 * (t & 1);
}

// Which pair of a lane's eight values register i of the matrix holds, for an instruction. Registers
// 0 and 2 are of row g, 1 and 3 of row g + 8.
PROX24_BOTH int PairOf(int instruction, int i) { return 2 * instruction + i / 2; }

}  // namespace prox24

#endif  // PROX24_PACKED_FRAGMENTS_H_
