// A request's body, read field by field. What nobody asked for is refused at the end, so that no field is
// ever ignored in silence.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace fathom::serve {

/// All of it throws ApiError (400) with the field's name. A field that is null is a field that is not there.
class JsonFields {
 public:
  /// `body` is one JSON object.
  explicit JsonFields(std::string_view body);
  ~JsonFields();
  /// The fields of an object inside of another; `path` is its name in errors. It is not copied.
  JsonFields(const nlohmann::json& object, std::string path);
  JsonFields(const JsonFields&) = delete;
  JsonFields& operator=(const JsonFields&) = delete;

  /// Null where it is absent or null. Counts as read.
  const nlohmann::json* find(const std::string& name);
  std::optional<std::string> text(const std::string& name);
  std::optional<std::int64_t> integer(const std::string& name, std::int64_t low, std::int64_t high);
  std::optional<double> number(const std::string& name, double low, double high);
  bool flag(const std::string& name, bool otherwise);

  /// A field that OpenAI has and we have not: refused unless its value asks for nothing (null, false, 0, "",
  /// [] or {}).
  void refuse(const std::string& name, const std::string& why);
  /// A field that may say anything, as it changes nothing of the answer.
  void ignore(const std::string& name) { read_.insert(name); }
  /// Refuses fields that none of the above was asked about.
  void refuse_others() const;

  /// "stream_options.include_usage".
  std::string name_of(const std::string& field) const { return path_.empty() ? field : path_ + "." + field; }

 private:
  std::unique_ptr<nlohmann::json> own_;
  const nlohmann::json* object_;
  std::string path_;
  std::set<std::string> read_;
};

/// A value as errors say it: "an array", "null", "1.5", "the string \"true\"", as long as a line has room.
std::string described(const nlohmann::json& value);

}  // namespace fathom::serve
