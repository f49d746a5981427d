// The list of planted kernels, and how one is launched.
#include "planted/planted.h"

#include <map>
#include <memory>
#include <stdexcept>

#include "planted/case.h"

namespace planted {
namespace {

// Filled by the constructors of static objects in other files: made by whoever comes first.
std::map<std::string, Entry>& cases() {
  static std::map<std::string, Entry> all;
  return all;
}

using Floats = std::unique_ptr<float, void (*)(void*)>;

Floats on_device(size_t count) {
  return {static_cast<float*>(simt::device_malloc(count * sizeof(float))), simt::device_free};
}

}  // namespace

Case::Case(const char* name, Entry entry) {
  if (!cases().emplace(name, std::move(entry)).second) {
    throw std::logic_error(std::string("two planted kernels have one name: ") + name);
  }
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const auto& [name, entry] : cases()) found.push_back(name);
  return found;
}

std::vector<float> run(const std::string& name, bool with_bug) {
  const auto found = cases().find(name);
  if (found == cases().end()) throw std::invalid_argument("no planted kernel: " + name);
  const Entry& entry = found->second;
  const int outputs = entry.shape.floats();
  const Floats in = on_device(kInputs), out = on_device(outputs);
  for (int i = 0; i < kInputs; ++i) in.get()[i] = static_cast<float>(i + 1);
  const fused_lm::Status status = entry.run(with_bug, in.get(), out.get());
  if (status != fused_lm::kOk) throw std::runtime_error(status);
  return {out.get(), out.get() + outputs};
}

}  // namespace planted
