// From a model's logits to the rows of a chain: one way for the draft, the target and what is between.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "infer/sampling.h"
#include "infer/speculate/cached_model.h"
#include "infer/speculate/level.h"

namespace fathom {

class RowRule {
 public:
  /// How a token comes of a row.
  enum class Tokens : std::uint8_t {
    Drawn,       // by the chain's chance
    SharedNoise  // by noise of (seed, position) that all levels share: the text does not depend on the draft
  };
  /// `prompt`: so many tokens of the text are the prompt's, for the penalties. At temperature 0 the likeliest
  /// token is chosen, whatever `tokens` says.
  RowRule(SamplingOptions sampling, Tokens tokens, std::int64_t prompt)
      : sampling_(std::move(sampling)), tokens_(tokens), prompt_(prompt) {}

  /// What has to be known of a pass for its rows. `wants_sureness`: somebody reads Row::sure.
  WantedRows wanted(bool wants_sureness) const;
  /// What follows `text`, by row number i of `count` of a pass that told what is wanted(), or logits.
  /// UserError as sample().
  Row row(const PassRows& told, std::size_t i, std::size_t count, std::span<const std::int32_t> text,
          bool wants_sureness) const;
  /// All `count` rows of a pass, the first after text.first(first), by all threads. UserError as row().
  void add_rows(const PassRows& told, std::span<const std::int32_t> text, std::size_t first,
                std::size_t count, bool wants_sureness, std::vector<Row>& rows) const;
  /// The same of a level whose rows nobody needs. False, and none, where a number is not finite: only of the
  /// target is that an error.
  bool proposals(const PassRows& told, std::span<const std::int32_t> text, std::size_t first,
                 std::size_t count, bool wants_sureness, std::vector<Row>& rows) const;
  /// A guess that one token follows.
  Row certainly(std::int32_t id, double sure) const;

 private:
  Row of_logits(std::span<const float> logits, std::span<const std::int32_t> text, bool wants_sureness) const;
  bool chooses() const { return sampling_.temperature <= 0 || tokens_ == Tokens::SharedNoise; }

  SamplingOptions sampling_;
  Tokens tokens_;
  std::int64_t prompt_;
};

}  // namespace fathom
