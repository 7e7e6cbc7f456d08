// "Did you mean": the key that a misspelt one was most likely meant to be.
#pragma once

#include <string>
#include <string_view>

namespace fathom {

/// A sentence for a message about the unknown key `path`: "Did you mean model.depth?", or, when nothing is
/// near, the keys that the section has.
std::string suggest_key(std::string_view path);

/// Levenshtein distance, with a swap of neighbours counted as one edit. Only the first 64 bytes are compared.
int edit_distance(std::string_view a, std::string_view b);

}  // namespace fathom
