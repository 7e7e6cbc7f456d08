#include "src/io/safetensors_header.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"

namespace fathom {

namespace {

using Json = nlohmann::json;

constexpr std::string_view kMetadata = "__metadata__";
constexpr std::size_t kMostDimensions = 16;
constexpr int kMostNesting = 4;

struct TypeName {
  SafetensorsType type;
  const char* name;
  std::size_t bytes;
};
constexpr std::array<TypeName, 13> kTypes = {{{SafetensorsType::Bool, "BOOL", 1},
                                              {SafetensorsType::U8, "U8", 1},
                                              {SafetensorsType::I8, "I8", 1},
                                              {SafetensorsType::I16, "I16", 2},
                                              {SafetensorsType::U16, "U16", 2},
                                              {SafetensorsType::I32, "I32", 4},
                                              {SafetensorsType::U32, "U32", 4},
                                              {SafetensorsType::I64, "I64", 8},
                                              {SafetensorsType::U64, "U64", 8},
                                              {SafetensorsType::F16, "F16", 2},
                                              {SafetensorsType::BF16, "BF16", 2},
                                              {SafetensorsType::F32, "F32", 4},
                                              {SafetensorsType::F64, "F64", 8}}};

const TypeName& named(SafetensorsType t) {
  return *std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeName& n) { return n.type == t; });
}

// Names come from a stranger's file into a message of one line.
std::string quoted(const std::string& name) {
  constexpr std::size_t kMost = 80;
  const std::string text = Json(name.substr(0, kMost)).dump(-1, ' ', true, Json::error_handler_t::replace);
  return name.size() > kMost ? text + "..." : text;
}

// a * b, unless that exceeds what an int64 holds.
std::optional<std::int64_t> product(std::int64_t a, std::int64_t b) {
  if (b != 0 && a > std::numeric_limits<std::int64_t>::max() / b) return std::nullopt;
  return a * b;
}

class Parser {
 public:
  Parser(std::string_view text, std::size_t data_bytes, const std::string& path)
      : text_(text), data_bytes_(data_bytes), path_(path) {}

  SafetensorsHeader parse() {
    const Json json = parse_json();
    if (!json.is_object()) refuse("its header is no JSON object");
    for (const auto& [name, value] : json.items()) {
      if (name == kMetadata) {
        read_metadata(value);
      } else {
        read_tensor(name, value);
      }
    }
    return in_order();
  }

 private:
  struct Placed {
    SafetensorsEntry entry;
    std::size_t begin, end;
  };

  [[noreturn]] void refuse(const std::string& why) const {
    throw UserError(fmt::format("{} is not a usable safetensors file: {}.", path_, why));
  }
  [[noreturn]] void refuse(const std::string& name, const std::string& why) const {
    refuse(fmt::format("tensor {} {}", quoted(name), why));
  }

  // A name that stands twice would silently be the last one's.
  Json parse_json() const {
    std::set<std::string> names;
    std::string twice;
    const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
      if (depth > kMostNesting) refuse("its header is nested too deeply");
      if (event == Json::parse_event_t::key && depth == 1 &&
          !names.insert(parsed.get_ref<const std::string&>()).second) {
        twice = parsed.get<std::string>();
      }
      return true;
    };
    Json json;
    try {
      json = Json::parse(text_, watch);
    } catch (const Json::exception&) {
      refuse("its header is no JSON");
    }
    if (!twice.empty()) refuse(twice, "is there twice");
    return json;
  }

  void read_metadata(const Json& value) {
    if (!value.is_object()) refuse("__metadata__ is no JSON object");
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) refuse(fmt::format("__metadata__ {} is no text", quoted(key)));
      header_.metadata[key] = text.get<std::string>();
    }
  }

  // A whole number of at least 0 and below 2^63.
  std::int64_t number(const std::string& name, const Json& value, const char* what) const {
    const bool is_whole =
        value.is_number_unsigned() &&
        value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (!is_whole) refuse(name, fmt::format("has a {} that is no whole number of at least 0", what));
    return value.get<std::int64_t>();
  }

  const Json& member(const std::string& name, const Json& value, const char* key, bool is_array) const {
    const auto found = value.find(key);
    if (found == value.end() || found->is_array() != is_array) refuse(name, fmt::format("has no {}", key));
    return *found;
  }

  void read_tensor(const std::string& name, const Json& value) {
    if (!value.is_object()) refuse(name, "is no JSON object");
    const Json& type = member(name, value, "dtype", false);
    const Json& shape = member(name, value, "shape", true);
    const Json& range = member(name, value, "data_offsets", true);
    const auto known = std::find_if(kTypes.begin(), kTypes.end(),
                                    [&](const TypeName& n) { return type.is_string() && type == n.name; });
    if (known == kTypes.end()) {
      refuse(name, fmt::format("is of a dtype that Fathom does not know, {}",
                               quoted(type.is_string() ? type.get<std::string>() : "?")));
    }
    if (shape.size() > kMostDimensions) refuse(name, fmt::format("has {} dimensions", shape.size()));
    SafetensorsEntry entry{name, known->type, {}};
    std::optional<std::int64_t> bytes = static_cast<std::int64_t>(known->bytes);
    for (const Json& dimension : shape) {
      entry.shape.push_back(number(name, dimension, "shape"));
      bytes = product(*bytes, entry.shape.back());
      if (!bytes) refuse(name, "has a shape too large for any file");
    }
    if (range.size() != 2) refuse(name, "has data_offsets that are not two numbers");
    const std::int64_t begin = number(name, range[0], "start"), end = number(name, range[1], "end");
    if (begin > end || static_cast<std::uint64_t>(end) > data_bytes_) {
      refuse(name, fmt::format("lies at {} to {} of {} bytes of data: the file was cut off, or lies", begin,
                               end, data_bytes_));
    }
    if (end - begin != *bytes) {
      refuse(name, fmt::format("has {} bytes where its shape and dtype need {}", end - begin, *bytes));
    }
    placed_.push_back({std::move(entry), static_cast<std::size_t>(begin), static_cast<std::size_t>(end)});
  }

  SafetensorsHeader in_order() {
    std::stable_sort(placed_.begin(), placed_.end(), [](const Placed& a, const Placed& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    std::size_t position = 0;
    for (Placed& p : placed_) {
      if (p.begin < position) refuse(p.entry.name, "overlaps another one");
      if (p.begin > position)
        refuse(fmt::format("bytes {} to {} of its data belong to no tensor", position, p.begin));
      position = p.end;
      header_.begins.push_back(p.begin);
      header_.entries.push_back(std::move(p.entry));
    }
    if (position != data_bytes_) {
      refuse(fmt::format("bytes {} to {} of its data belong to no tensor", position, data_bytes_));
    }
    return std::move(header_);
  }

  std::string_view text_;
  std::size_t data_bytes_;
  const std::string& path_;
  std::vector<Placed> placed_;
  SafetensorsHeader header_;
};

}  // namespace

std::size_t size_of(SafetensorsType t) { return named(t).bytes; }
const char* name_of(SafetensorsType t) { return named(t).name; }

std::int64_t SafetensorsEntry::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t d : shape) n *= d;
  return n;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, std::size_t data_bytes,
                                           const std::string& path) {
  return Parser(text, data_bytes, path).parse();
}

std::string safetensors_header(const std::vector<SafetensorsEntry>& entries,
                               const SafetensorsMetadata& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[std::string(kMetadata)] = metadata;
  std::size_t begin = 0;
  for (const SafetensorsEntry& entry : entries) {
    const bool negative =
        std::any_of(entry.shape.begin(), entry.shape.end(), [](std::int64_t d) { return d < 0; });
    if (negative || entry.name == kMetadata || json.contains(entry.name)) {
      throw InternalError(
          fmt::format("[safetensors] {}: named twice, or of a negative dimension", entry.name));
    }
    const std::size_t end = begin + entry.bytes();
    json[entry.name] = {
        {"dtype", name_of(entry.type)}, {"shape", entry.shape}, {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text = json.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace fathom
