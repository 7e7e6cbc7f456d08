// The model whose text is wanted: all of its keys and values, and nothing but its own rows.
#pragma once

#include <cstdint>
#include <vector>

#include "infer/speculate/cached_model.h"
#include "infer/speculate/row_rule.h"

namespace fathom {

/// Rows of a pass over proposals, at most: others leave room for so many.
inline constexpr std::int64_t kMostVerified = 32;

class TargetLevel final : public Level {
 public:
  enum class Sequence : std::uint8_t { Own, Borrowed };
  TargetLevel(const CachedModel& m, const RowRule& rule, Sequence whose = Sequence::Own);

  /// Goes on in a sequence that is somebody else's and has all of the text but its last token. `watches`: a
  /// level retrieves by its queries.
  void borrow(SequenceId sequence, std::span<const std::int32_t> text, bool watches);

  /// The keys and values of a text but its last token.
  void read(std::span<const std::int32_t> text);
  /// For measurements: as if that were read, with what lies in the cache's blocks, and the share `kept` of it
  /// in routed layers.
  void assume(std::span<const std::int32_t> text, double kept);
  bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) override;
  /// Takes the rows back that belong to proposals that were not taken.
  void settle(std::span<const std::int32_t> text) override;

  SequenceId sequence() const { return sequence_; }
  /// From now on passes bring their logits, though the rows do without.
  void want_logits() { wants_logits_ = true; }
  /// Of the last pass the logits of row i, [vocab]; where they were wanted.
  std::span<const float> logits(std::size_t i) const {
    const auto width = static_cast<std::size_t>(m_.vocab);
    return std::span(told_.logits).subspan(i * width, width);
  }
  const CachedModel& cached() const { return m_; }

 private:
  void keep(std::int64_t tokens);

  CachedModel m_;
  const RowRule& rule_;
  OwnSequence own_;
  SequenceId sequence_ = -1;
  std::vector<std::int32_t> ids_;  // that the cache has
  std::size_t settled_ = 0;        // of them, how many do not change any more
  PassRows told_;
  bool wants_logits_ = false;
};

}  // namespace fathom
