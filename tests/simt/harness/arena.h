// The dynamic shared memory of a block, the same bytes for every block of a launch.
#pragma once

#include "harness/simt.h"

namespace simt {

class Arena {
 public:
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void poison();  // with NaN in every float type
  char* data() const { return data_; }
  uint32_t bytes() const { return bytes_; }

 private:
  char* allocation_;
  char* data_;
  uint32_t bytes_;
};

void begin_launch();  // forgets which block touched what

}  // namespace simt
