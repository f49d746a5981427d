// What the torch side asks about a GPU's shared memory. csrc/device.cpp answers; on a CPU the
// harness' tests/simt/host/device.cpp does.
#pragma once

#include <cstddef>

namespace fused_lm {

// Bytes that a block may ask for.
size_t shared_bytes_per_block(int device_index);

}  // namespace fused_lm
