// What csrc/common/device.h asks, answered without a GPU.
#include "common/device.h"
#include "harness/simt.h"
#include "shared_memory.h"

namespace fused_lm {

DeviceScope::DeviceScope(int) : torch_guard_(nullptr) {}
DeviceScope::~DeviceScope() = default;

Stream current_stream(int) { return nullptr; }

// Small, and more than one, so that persistent grids have several blocks with several tiles.
int multiprocessors(int) { return 2; }

size_t shared_bytes_per_block(int) { return simt::config.max_smem_bytes; }

bool is_hopper(int) { return simt::config.hopper; }

}  // namespace fused_lm
