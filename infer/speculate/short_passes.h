// Passes over a few rows of one sequence, each kind recorded when it comes for the second time and from then
// on launched as one: on a GPU the host takes longer to ask for the ops of such a pass than the device for
// most of them.
//
// What such a pass gets from the host lies where it always lies: tokens, positions, lengths and the
// sequence's blocks, one copy. So only layers that take all rows can be recorded: what a routed one keeps
// comes to the host in the midst of a pass, and its tables go back.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

#include "infer/kv_cache.h"
#include "src/model/transformer.h"

namespace fathom {

class ShortPasses {
 public:
  static constexpr std::int64_t kMostRows = 17;

  /// Null where nothing can be recorded: by the backend, of a model whose routed blocks are asked, or that
  /// has experts or weights of few bits. All arguments outlive it. `unrecorded`: op by op where the backend
  /// cannot record, for tests.
  static std::unique_ptr<ShortPasses> open(Context& c, const Transformer& model, const Causal& rule,
                                           KvCache& cache, bool unrecorded = false);
  ~ShortPasses();

  /// Logits of the last `wanted` rows, [wanted, V], until the next run, of tokens that come next in a
  /// sequence, the first of them at `position` of its text; they are in the cache afterwards. At most
  /// kMostRows; the cache fits them.
  Tensor run(SequenceId id, std::span<const std::int32_t> tokens, std::int64_t position, std::int64_t wanted);

 private:
  struct Pass;
  ShortPasses(Context& c, const Transformer& model, const Causal& rule, KvCache& cache);
  Pass& pass_of(std::int64_t rows, std::int64_t wanted, bool watched);
  void compute(Pass& pass);

  Context& c_;
  const Transformer& model_;
  SelectionRule rule_;
  KvCache& cache_;
  Allocator pool_;
  std::map<std::tuple<std::int64_t, std::int64_t, bool>, std::unique_ptr<Pass>> passes_;
};

}  // namespace fathom
