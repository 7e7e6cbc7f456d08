// Who may use the server.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fathom::serve {

class ApiKeys {
 public:
  ApiKeys() = default;  // everybody may
  /// UserError: one is empty, or is none that a header can carry.
  explicit ApiKeys(std::vector<std::string> keys);
  /// One a line; empty lines and those that begin with # are none. UserError: the file cannot be read, or
  /// holds none.
  static ApiKeys from_file(const std::string& path);
  void add(const ApiKeys& more) { keys_.insert(keys_.end(), more.keys_.begin(), more.keys_.end()); }

  bool empty() const { return keys_.empty(); }
  /// `authorization` is the header's value, "Bearer KEY". The time that it takes says nothing of the keys but
  /// how many there are.
  bool admit(std::string_view authorization) const;

 private:
  std::vector<std::string> keys_;
};

}  // namespace fathom::serve
