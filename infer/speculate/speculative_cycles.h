// Speculative decoding of the engine's texts, where few are being written: each goes on over the sequence
// that the engine has of it, so that going from passes to cycles and back computes nothing again.
//
// Its chance is that of its chain (chain.h), which lives as long as the text: numbers that a cycle has used
// are not used by a later one, and those of the engine's own draws have other names.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "infer/cycles.h"
#include "infer/speculate/level_chain.h"

namespace fathom {

class SpeculativeCycles final : public Cycles {
 public:
  /// `target` is the engine's (Engine::cached_model()), which outlives it as the draft does (null: no model
  /// drafts). UserError: what check_speculation() says of texts as long as the context.
  SpeculativeCycles(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options,
                    std::int64_t most_texts = 1);

  std::int64_t most_texts() const override { return most_texts_; }
  bool takes(RequestId id, const Request& request) override;
  bool watches() const override { return options_.retrieves(); }
  bool cycle(const CycleText& text, Cycle& result) override;
  bool give_up() override;
  void leave(RequestId id) override;
  void end(RequestId id) override { texts_.erase(id); }
  CycleStats stats() const override { return stats_; }

 private:
  struct Text {
    bool is_plain = false;               // it does not go by cycles
    std::unique_ptr<LevelChain> levels;  // null: no cycle yet
    SequenceId sequence = -1;            // that its target works on; -1: none
    std::vector<std::int32_t> ids;       // the text as the last cycle left it
  };
  void begin(Text& text, const CycleText& of) const;
  void run(Text& text, const CycleText& of, Cycle& result);
  void count(const LevelChain& levels, const std::vector<LevelCounts>& before);

  CachedModel target_;
  const CachedModel* draft_;
  SpeculationOptions options_;
  std::int64_t most_texts_;
  std::unique_ptr<ShortPasses> passes_,
      skipping_;  // of all texts, with the blocks that are routed or without
  std::map<RequestId, Text> texts_;
  CycleStats stats_;
};

}  // namespace fathom
