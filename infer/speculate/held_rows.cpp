#include "infer/speculate/held_rows.h"

namespace fathom {

HeldRows::HeldRows(Context& c, ConstView logits, std::int64_t vocab, std::int64_t choices, double temperature)
    : backend_(c.backend()), shares_(c.empty({logits.size / vocab, choices}, DType::F64)) {
  backend_.make_shares(shares_, logits, logits.size / vocab, vocab, choices, temperature);
}

ConstView HeldRows::row(std::size_t i) const {
  const auto at = static_cast<std::int64_t>(i);
  return shares_.rows(at, at + 1);
}

std::vector<double> HeldRows::on_host(std::size_t i) const {
  const auto at = static_cast<std::int64_t>(i);
  return to_host<double>(backend_, shares_.rows(at, at + 1));
}

}  // namespace fathom
