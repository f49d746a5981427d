// Every synchronisation that ran, by place; one of them may be switched off.
#include <set>
#include <tuple>

#include "harness/state.h"

namespace simt {
namespace {

std::set<std::tuple<std::string, int, std::string>> seen;
Location last{nullptr, 0};  // most threads come to the same place one after another
const char* last_kind;

}  // namespace

bool takes_part(const char* kind, Location here) {
  if (here.file != last.file || here.line != last.line || kind != last_kind) {
    seen.emplace(here.file, here.line, kind);
    last = here;
    last_kind = kind;
  }
  return config.dropped.file == nullptr || !same_place(here, config.dropped);
}

std::vector<Site> sites() {
  std::vector<Site> found;
  for (const auto& [file, line, kind] : seen) found.push_back({kind, file, line});
  return found;
}

void forget_sites() {
  seen.clear();
  last = {nullptr, 0};
}

}  // namespace simt
