// common/device.h on a GPU, with this extension's own static CUDA runtime. That it isn't torch's
// does no harm: both stand on the driver's one primary context per GPU, and streams are the
// driver's.
#include "common/device.h"
#include "shared_memory.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

// Only libtorch_cuda has it. Python loads extensions with RTLD_NOW, so a strong reference would
// keep this one from loading where torch is a CPU build.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fused_lm {
namespace {

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

}  // namespace

DeviceScope::DeviceScope(int device_index) : torch_guard_(nullptr) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this build of torch has no CUDA: install a CUDA build of torch");
  // torch restores the GPU it had without making a context there; cudaSetDevice would make one.
  DeviceGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device_index, &guard));
  torch_guard_ = guard;
  check_cuda(cudaSetDevice(device_index));  // for this runtime; the tensor's GPU has its context
}

DeviceScope::~DeviceScope() {
  aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(torch_guard_));
}

Stream current_stream(int device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<Stream>(stream);
}

int multiprocessors(int device_index) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index));
  return count;
}

size_t shared_bytes_per_block(int device_index) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index));
  return static_cast<size_t>(bytes);
}

bool is_hopper(int device_index) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index));
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index));
  return major == 9 && minor == 0;
}

}  // namespace fused_lm

// The CUDA version that the driver speaks, like 13000; 0 without a driver.
extern "C" int fused_lm_driver_version(void) {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
