// Small kernels with one mistake each, and the same kernels without it: what proves the harness.
#pragma once

#include <string>
#include <vector>

namespace planted {

std::vector<std::string> names();

// Launches one; what it wrote comes back. The right kernel runs where `with_bug` is false.
std::vector<float> run(const std::string& name, bool with_bug);

}  // namespace planted
