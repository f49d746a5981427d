// The planted kernels on a GPU: the same list as planted.cu's, launched by the CUDA runtime. One
// shared library for tests/test_gpu_wrappers.py, which compiles it where nvcc is.
#include <cstring>
#include <map>
#include <string>

#include "planted/case.h"

namespace planted {
namespace {

std::map<std::string, Entry>& cases() {
  static std::map<std::string, Entry> all;
  return all;
}

// What the harness does: gIn[i] = i + 1, gOut zero. The first error's name, or none.
cudaError_t run_on(const Entry& entry, bool with_bug, float* in, float* out, float* result,
                   fused_lm::Status* status) {
  float inputs[kInputs];
  for (int i = 0; i < kInputs; ++i) inputs[i] = static_cast<float>(i + 1);
  const size_t bytes = entry.shape.floats() * sizeof(float);
  cudaError_t error = cudaMemcpy(in, inputs, sizeof(inputs), cudaMemcpyHostToDevice);
  if (error == cudaSuccess) error = cudaMemset(out, 0, bytes);
  if (error != cudaSuccess) return error;
  *status = entry.run(with_bug, in, out);
  if (*status != fused_lm::kOk) return cudaSuccess;
  return cudaMemcpy(result, out, bytes, cudaMemcpyDeviceToHost);
}

}  // namespace

Case::Case(const char* name, Entry entry) { cases().emplace(name, std::move(entry)); }

}  // namespace planted

// How many floats a kernel writes; -1 if there is no such kernel.
extern "C" int planted_outputs(const char* name) {
  const auto found = planted::cases().find(name);
  return found == planted::cases().end() ? -1 : found->second.shape.floats();
}

// Runs one; an empty sentence if it went well.
extern "C" const char* planted_run(const char* name, bool with_bug, float* result) {
  const planted::Entry& entry = planted::cases().at(name);
  float *in = nullptr, *out = nullptr;
  fused_lm::Status status = fused_lm::kOk;
  cudaError_t error = cudaMalloc(&in, planted::kInputs * sizeof(float));
  if (error == cudaSuccess) error = cudaMalloc(&out, entry.shape.floats() * sizeof(float));
  if (error == cudaSuccess) error = planted::run_on(entry, with_bug, in, out, result, &status);
  cudaFree(in);
  cudaFree(out);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return status == fused_lm::kOk ? "" : status;
}
