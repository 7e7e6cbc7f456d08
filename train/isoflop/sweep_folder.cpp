#include "train/isoflop/sweep_folder.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/config/print.h"
#include "src/io/atomic_file.h"

namespace fathom::isoflop {
namespace {

namespace fs = std::filesystem;

void make(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error)
    throw UserError(fmt::format("cannot create {}: {}.", folder.string(), error.message()),
                    "Give a --dir that you may write to.");
}

// Several workers start at once: a copy that is right already is left alone, and its writers take turns (the
// claim).
void copy(const fs::path& to, const std::string& text) {
  std::error_code error;
  if (fs::exists(to, error) && read_file(to.string(), "sweep") == text) return;
  write_file(to.string(), text);
}

}  // namespace

void SweepFolder::prepare(const Sweep& sweep, const DataSize& data) const {
  for (const char* name : {"cells", "claims", "results", "decisions"}) make(path_ / name);
  const Claim turn = Claim::wait_for(claim("sweep"));
  const std::optional<DataSize> before = data_size();
  if (before && *before != data) {
    throw UserError(
        fmt::format(
            "{} holds cells trained on a store of {} tokens and {} ids, and data.train has {} and {}.",
            path_.string(), before->tokens, before->vocab, data.tokens, data.vocab),
        "Use another --dir, or the store that the sweep was started with.");
  }
  copy(path_ / "data.json",
       nlohmann::ordered_json{{"tokens", data.tokens}, {"vocab", data.vocab}}.dump() + "\n");
  Config base = sweep.base;
  if (!base.train.target_flops && !base.train.tokens && !base.train.steps) base.train.steps = 1;
  copy(path_ / "base.yaml", to_yaml(base));
  copy(path_ / "sweep.yaml", read_file(sweep.file.string(), "sweep"));
}

std::optional<DataSize> SweepFolder::data_size() const {
  const fs::path path = path_ / "data.json";
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  const auto j = nlohmann::json::parse(read_file(path.string(), "data size"), nullptr, false);
  if (!j.is_object()) throw UserError(path.string() + " is not a JSON object.", "Remove it and run again.");
  return DataSize{j.value("tokens", std::int64_t{0}), j.value("vocab", std::int64_t{0})};
}

std::optional<Row> SweepFolder::read_result(const std::string& id) const {
  const std::string path = result(id).string();
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  return row_from_json(read_file(path, "result"), path);
}

void SweepFolder::write_result(const Row& row) const {
  write_file(result(row.cell).string(), to_json(row) + "\n");
}

void SweepFolder::remove_result(const std::string& id) const { remove_file(result(id).string()); }

bool is_sweep_folder(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path / "sweep.yaml", error) && fs::is_regular_file(path / "base.yaml", error);
}

}  // namespace fathom::isoflop
