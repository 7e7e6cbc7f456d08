#include "serve/json_fields.h"

#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "serve/api_error.h"
#include "src/io/utf8.h"

namespace fathom::serve {

namespace {

using nlohmann::json;

[[noreturn]] void wrong_type(const std::string& name, const char* expected, const json& got) {
  throw bad_field(name, fmt::format("'{}' is {}: expected {}.", name, described(got), expected),
                  "invalid_type");
}

template <typename Number>
[[noreturn]] void out_of_range(const std::string& name, Number low, Number high, const json& got) {
  constexpr double kAny = 1e15;  // no bound that anybody thought of
  const bool any_high = static_cast<double>(high) >= kAny, any_low = static_cast<double>(low) <= -kAny;
  const std::string range = any_high && any_low ? std::string("a whole number of 64 bits")
                            : any_high          ? fmt::format("{} or more", low)
                            : any_low           ? fmt::format("{} or less", high)
                                                : fmt::format("from {} to {}", low, high);
  throw bad_field(name, fmt::format("'{}' is {}: expected {}.", name, got.dump(), range), "invalid_value");
}

bool asks_for_nothing(const json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) ||
         (value.is_number() && value.get<double>() == 0) || (!value.is_primitive() && value.empty()) ||
         (value.is_string() && value.get_ref<const std::string&>().empty());
}

// Brackets within brackets, at most: a body of nothing else costs its parser a hundred times its size.
constexpr int kDeepest = 32;

bool too_deep(std::string_view body) {
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kDeepest) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace

std::string described(const json& value) {
  if (value.is_array()) return "an array";
  if (value.is_object()) return "an object";
  constexpr std::size_t kMost = 32;
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > kMost) text = text.substr(0, utf8_prefix(text.substr(0, kMost))) + "...";
  return value.is_string() ? "the string " + text : text;
}

JsonFields::JsonFields(std::string_view body) : own_(std::make_unique<json>()), object_(own_.get()) {
  if (too_deep(body))
    throw ApiError(fmt::format("The body nests arrays or objects more than {} deep.", kDeepest),
                   {.code = "invalid_json"});
  try {
    *own_ = json::parse(body);
  } catch (const json::exception& e) {
    // Its message goes on with what the parser had expected; where it stood is what helps.
    std::string what = e.what();
    what = what.substr(what.find("] ") == std::string::npos ? 0 : what.find("] ") + 2, 160);
    throw ApiError("The body is not JSON: " + what, {.code = "invalid_json"});
  }
  if (!own_->is_object())
    throw ApiError(fmt::format("The body is {}: expected a JSON object.", described(*own_)),
                   {.code = "invalid_json"});
}

JsonFields::JsonFields(const json& object, std::string path) : object_(&object), path_(std::move(path)) {
  if (!object.is_object()) wrong_type(path_, "an object", object);
}

JsonFields::~JsonFields() = default;

const json* JsonFields::find(const std::string& name) {
  read_.insert(name);
  const auto at = object_->find(name);
  return at == object_->end() || at->is_null() ? nullptr : &*at;
}

std::optional<std::string> JsonFields::text(const std::string& name) {
  const json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) wrong_type(name_of(name), "a string", *value);
  return value->get<std::string>();
}

std::optional<std::int64_t> JsonFields::integer(const std::string& name, std::int64_t low,
                                                std::int64_t high) {
  const json* value = find(name);
  if (value == nullptr) return std::nullopt;
  // Some clients send 16.0.
  const bool whole = value->is_number_float() && std::floor(value->get<double>()) == value->get<double>();
  if (!value->is_number_integer() && !whole) wrong_type(name_of(name), "a whole number", *value);
  const bool huge = whole ? std::abs(value->get<double>()) >= 1e15
                          : value->is_number_unsigned() && value->get<std::uint64_t>() > INT64_MAX;
  if (huge) out_of_range(name_of(name), low, high, *value);
  const std::int64_t x = whole ? static_cast<std::int64_t>(value->get<double>()) : value->get<std::int64_t>();
  if (x < low || x > high) out_of_range(name_of(name), low, high, *value);
  return x;
}

std::optional<double> JsonFields::number(const std::string& name, double low, double high) {
  const json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) wrong_type(name_of(name), "a number", *value);
  const auto x = value->get<double>();
  if (!(x >= low && x <= high)) out_of_range(name_of(name), low, high, *value);
  return x;
}

bool JsonFields::flag(const std::string& name, bool otherwise) {
  const json* value = find(name);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) wrong_type(name_of(name), "true or false", *value);
  return value->get<bool>();
}

void JsonFields::refuse(const std::string& name, const std::string& why) {
  const json* value = find(name);
  if (value != nullptr && !asks_for_nothing(*value))
    throw bad_field(name_of(name), fmt::format("'{}' is not supported here: {}", name_of(name), why),
                    "unsupported_parameter");
}

void JsonFields::refuse_others() const {
  for (const auto& [name, value] : object_->items()) {
    if (read_.contains(name)) continue;
    const std::string shown = name_of(name.substr(0, 100));  // it may be as long as the body
    throw bad_field(shown, fmt::format("Unrecognized request argument supplied: {}", shown),
                    "unknown_parameter");
  }
}

}  // namespace fathom::serve
