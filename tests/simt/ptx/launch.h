// Host twin of csrc/ptx/launch.h: a launch runs the grid before it returns.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "common/types.h"
#include "ptx/builtins.h"

namespace fused_lm {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem_bytes;
  Stream stream;
};

template <class SharedStorage>
SharedStorage& dynamic_smem(SIMT_HERE) {
  if (sizeof(SharedStorage) > ::simt::current_block->smem_bytes) {
    ::simt::fail("SharedStorage at %s has %zu bytes, the launch gave %u",
                 ::simt::to_string(here).c_str(), sizeof(SharedStorage),
                 ::simt::current_block->smem_bytes);
  }
  return *reinterpret_cast<SharedStorage*>(::simt::current_block->smem);
}

constexpr size_t kDefaultSmemBytes = 48 * 1024;

// A mistake in the kernel is thrown as simt::Error, so a launch that returns has been right.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... args) {
  const std::tuple<std::remove_const_t<Parameters>...> given(std::forward<Arguments>(args)...);
  ::simt::run_grid(reinterpret_cast<const void*>(kernel), config.grid, config.block,
                   config.smem_bytes, 1, [&] { std::apply(kernel, given); });
  return kOk;
}

}  // namespace fused_lm
