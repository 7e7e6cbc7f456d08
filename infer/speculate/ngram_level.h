// A draft without a model: what followed the longest earlier occurrence of the text's last tokens (prompt
// lookup decoding).
#pragma once

#include <cstdint>
#include <vector>

#include "infer/speculate/row_rule.h"

namespace fathom {

class NgramLevel final : public Level {
 public:
  explicit NgramLevel(const RowRule& rule) : rule_(rule) {}
  /// False: the last two tokens do not stand together earlier in the text.
  bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) override;

 private:
  const RowRule& rule_;
};

}  // namespace fathom
