// Synthetic English-like text with structure that a small model learns quickly, for tests and first
// experiments.
//
// A document is a little story: a few people, each with a home and a pet, who recur and are asked about
// (facts to remember), verbs that agree with their subjects, numbers that are counted up in order, and nested
// brackets that close in the right order. Equal seeds give equal text on every machine.
#pragma once

#include <cstdint>
#include <string>

namespace fathom {

/// Document number `index` of the text with this seed: 0.3 to 3 kB of ASCII, ending in a line end.
std::string synthetic_document(std::uint64_t seed, std::uint64_t index);

/// Documents 0, 1, ... separated by blank lines, until they are at least `bytes` long.
std::string synthetic_text(std::int64_t bytes, std::uint64_t seed);

/// The same documents as a file: {"text": ...} a line when `path` ends in .jsonl, else as in synthetic_text.
/// At least `bytes` bytes of text. Returns the number of documents. UserError when the file cannot be
/// written, or another text stands there.
std::int64_t write_synthetic_text(const std::string& path, std::int64_t bytes, std::uint64_t seed);

}  // namespace fathom
