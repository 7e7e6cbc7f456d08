// Who goes on with the engine's texts by several tokens at a time: speculative decoding
// (speculate/speculative_cycles.h), of which the engine knows no more than this.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "infer/kv_cache.h"
#include "infer/sampling.h"

namespace fathom {

struct Request;
using RequestId = std::int64_t;

/// One text. Its sequence, in the engine's cache, has all of its tokens but the last.
struct CycleText {
  RequestId id = 0;
  const Request& request;
  SequenceId sequence = 0;
  std::span<const std::int32_t> ids;  // the prompt, then what was chosen
};

/// What a cycle chose, one token at least; the last one may be a stop token. The sequence has all of them
/// but the last.
struct Cycle {
  std::vector<SampledToken> tokens;                     // with their logprobs, where the request wants these
  std::vector<std::vector<SampledToken>> alternatives;  // of each token, with Request::top_logprobs
};

/// Since the beginning.
struct CycleStats {
  struct Level {  // from the first draft to the model
    std::string name;
    std::int64_t passes = 0;
    std::int64_t proposed = 0;  // to it
    std::int64_t accepted = 0;  // by it
    std::int64_t tokens = 0;    // that it handed on
  };
  std::vector<Level> levels;
  /// By reason, texts that are written plainly though few are.
  std::map<std::string, std::int64_t> plain_texts;
  std::int64_t given_up = 0;  // times that blocks were given back to the texts
};

/// Of the engine's thread.
class Cycles {
 public:
  virtual ~Cycles() = default;
  /// Where more texts are running or wait, all go plainly.
  virtual std::int64_t most_texts() const = 0;
  /// Whether the text goes by cycles at all.
  virtual bool takes(RequestId id, const Request& request) = 0;
  /// Whether KvCache::watch() is wanted of sequences from their beginning.
  virtual bool watches() const = 0;
  /// The cache has room for one more row of the text. False: nothing came of it, the sequence is as it was,
  /// and takes() says no from now on.
  virtual bool cycle(const CycleText& text, Cycle& result) = 0;
  /// Gives back all blocks of the engine's cache that are no text's own. False: there were none.
  virtual bool give_up() = 0;
  /// The text's sequence goes, and may come again as another: its own blocks beside that are given back.
  virtual void leave(RequestId id) = 0;
  /// The text is over.
  virtual void end(RequestId id) = 0;
  virtual CycleStats stats() const = 0;
};

}  // namespace fathom
