// What the torch side asks about a GPU to choose a kernel by. csrc/device.cpp answers; on a CPU the
// harness' tests/simt/host/device.cpp does.
#pragma once

#include <cstddef>

namespace fused_lm {

// Bytes that a block may ask for.
size_t shared_bytes_per_block(int device_index);

// Whether it runs code for sm_90a, which no other GPU does.
bool is_hopper(int device_index);

}  // namespace fused_lm
