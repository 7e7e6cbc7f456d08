// YAML text as a flat list of entries: the only file that knows yaml-cpp.
//
// The text is read as events and never as a tree, so nesting is cut off before the parser recurses into it,
// and anchors, aliases and tags are refused where they stand.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fathom {

struct Entry {
  enum class Form { Plain, Quoted, Null, List, Section };

  std::string path;  // dotted: "routing.causal.method"
  Form form = Form::Plain;
  std::string text;                // Plain and Quoted
  std::vector<std::string> items;  // List
  std::string where;               // "base.yaml:12", or "--set model.depth=12"
};

/// The entries of a YAML file in the order in which they stand. `name` is for messages. Throws UsageError on
/// text that is not UTF-8, is larger than 1 MiB, is not a map of sections, or has a key twice.
std::vector<Entry> read_document(std::string_view text, const std::string& name);

/// One override, "model.depth=12"; the value is a YAML scalar or a list such as [0.9, 0.95]. Throws
/// UsageError.
Entry read_override(std::string_view override_text);

/// The entry's value for a message: quoted where it is text, shortened, without control characters.
std::string show_value(const Entry& entry);

/// `text` shortened to what fits in a message, without control characters.
std::string show_text(std::string_view text);

}  // namespace fathom
