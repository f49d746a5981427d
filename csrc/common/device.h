// What the torch side asks about the current GPU. csrc/device.cpp answers; on a CPU the harness'
// tests/simt/device.cpp does.
#pragma once

#include "common/types.h"

namespace fused_lm {

// Makes a GPU the current one while it lives: torch's way, which touches no other GPU. Throws
// std::runtime_error, in one sentence, where this build of torch has no CUDA.
class DeviceScope {
 public:
  explicit DeviceScope(int device_index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  void* torch_guard_;
};

// torch's current stream on a GPU.
Stream current_stream(int device_index);

// SMs of a GPU.
int multiprocessors(int device_index);

}  // namespace fused_lm
