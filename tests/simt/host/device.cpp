// What csrc/common/device.h asks, answered without a GPU.
#include "common/device.h"
#include "harness/simt.h"
#include "shared_memory.h"

namespace fused_lm {

DeviceScope::DeviceScope(int) : torch_guard_(nullptr) {}
DeviceScope::~DeviceScope() = default;

Stream current_stream(int) { return nullptr; }

int multiprocessors(int) { return simt::config.multiprocessors; }

size_t shared_bytes_per_block(int) { return simt::config.max_smem_bytes; }

bool is_hopper(int) { return simt::config.hopper; }

}  // namespace fused_lm
