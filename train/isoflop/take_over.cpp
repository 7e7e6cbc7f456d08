#include "train/isoflop/take_over.h"

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"
#include "train/isoflop/plan.h"

namespace fathom::isoflop {
namespace {

void refuse_other_store(std::span<const Row> rows, const DataSize& data) {
  for (const Row& row : rows) {
    if (!row.done() || row.store_tokens == data.tokens) continue;
    throw UserError(
        fmt::format("The table's cell {} was trained on a store of {} tokens, and data.train has {}.",
                    row.cell, row.store_tokens, data.tokens),
        "Prepare the store that the table was made with; its cells say nothing about another one.");
  }
}

void refuse_other_config(const Row& row, const Row& planned) {
  if (row.trained == planned.trained) return;
  throw UserError(
      fmt::format("The table's cell {} was trained with another config than the sweep's file gives it.",
                  row.cell),
      "Use the sweep's file that the table was made with; families, budgets, shapes and seeds may be "
      "added to it.");
}

}  // namespace

// Cells appear as results decide on rates and further seeds, so rows are looked at again until none is new.
TakenOver take_over(const Sweep& sweep, const SweepFolder& folder, const DataSize& data,
                    std::span<const Row> rows) {
  refuse_other_store(rows, data);
  TakenOver result;
  std::map<std::string, const Row*> finished;
  for (const Row& row : rows) {
    if (row.done() && std::isfinite(row.judged().value_or(NAN))) {
      if (!finished.emplace(row.cell, &row).second)
        throw UserError(fmt::format("The table has two rows of the cell {}.", row.cell),
                        "Remove one of them.");
    } else {
      ++result.open;
    }
  }
  std::set<std::string> seen;
  for (bool any = true; any;) {
    any = false;
    std::vector<const Row*> found;
    for (const Cell& cell : cells_of(sweep, folder.decide(sweep))) {
      const auto at = finished.find(cell.id);
      if (at == finished.end() || !cell.lr || !seen.insert(cell.id).second) continue;
      refuse_other_config(*at->second, planned_row(sweep, cell, data));
      found.push_back(at->second);
    }
    for (const Row* row : found) {
      any = true;
      // A worker that has the cell now writes its own result; one that is there stands.
      const std::optional<Claim> claim = Claim::take(folder.claim(row->cell));
      if (!claim || folder.read_result(row->cell)) {
        ++result.known;
        continue;
      }
      folder.write_result(*row);
      ++result.taken;
    }
  }
  result.foreign = static_cast<std::int64_t>(finished.size() - seen.size());
  return result;
}

}  // namespace fathom::isoflop
