#include "src/config/print.h"

#include <algorithm>

#include <fmt/format.h>

#include "src/config/keys.h"
#include "src/config/scalar.h"

namespace fathom {
namespace {

std::size_t levels(std::string_view section) {
  return section.empty() ? 0 : 1 + static_cast<std::size_t>(std::count(section.begin(), section.end(), '.'));
}

}  // namespace

std::string to_yaml(const Config& config) {
  std::string yaml;
  std::string_view open;
  for (const Key& key : config_keys()) {
    const std::string_view section = key.section();
    if (section != open) {
      const std::size_t deep = levels(section) - 1;
      yaml += fmt::format("{}{:{}}{}:\n", deep == 0 ? "\n" : "", "", 2 * deep,
                          section.substr(section.rfind('.') + 1));
      open = section;
    }
    yaml += fmt::format("{:{}}{}: {}\n", "", 2 * levels(section), key.leaf(), key.print(config));
  }
  return yaml;
}

std::string difference(const Config& here, const Config& there) {
  std::string lines;
  for (const Key& key : config_keys()) {
    const std::string a = key.print(here);
    const std::string b = key.print(there);
    if (a != b) lines += fmt::format("{}: {} here, {} there\n", key.path, a, b);
  }
  return lines;
}

std::string config_reference() {
  std::string table = "| key | default | values | meaning |\n| --- | --- | --- | --- |\n";
  const Config defaults;
  for (const Key& key : config_keys()) {
    const std::string value = key.print(defaults);
    table += fmt::format("| `{}` | {} | {}{} | {} |\n", key.path,
                         value == "null" ? "unset" : fmt::format("`{}`", value), expectation(key),
                         key.reason.empty() ? "" : fmt::format(" ({})", key.reason), key.help);
  }
  return table;
}

}  // namespace fathom
