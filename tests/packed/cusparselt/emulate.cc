// Products by cusparselt.cc with the cuSPARSELt of this folder.

#include "cusparselt.cc"

#include <vector>

#pragma GCC visibility push(default)

extern "C" void load_release(int minor) { minor_release = minor; }

// The status; `used` gets how often the library was initialized, and plans were made, so far.
extern "C" int emulate(int device, const void* x, const void* weight, void* y, int64_t outputs,
                       int64_t inputs, int64_t batch, int without_memory, int* used) {
  std::vector<std::vector<char>> memory;
  const auto allocate = [&](size_t size) -> std::optional<void*> {
    if (without_memory) return std::nullopt;
    memory.emplace_back(size);
    return memory.back().data();
  };
  const cusparseStatus_t status =
      Multiply({device, CUDA_R_16BF, outputs, inputs, batch}, x, weight, y, nullptr, allocate);
  used[0] = initialized;
  used[1] = planned;
  return status;
}
