#include "train/isoflop/worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <set>
#include <thread>

#include <fmt/format.h>
#include <fnmatch.h>

#include "kernels/error.h"
#include "src/core/units.h"

namespace fathom::isoflop {
namespace {

constexpr int kFailuresInARow = 3;

class Worker {
 public:
  Worker(const Sweep& sweep, const SweepFolder& folder, const DataSize& data, const TrainCell& train_cell,
         const WorkOptions& options)
      : sweep_(sweep), folder_(folder), data_(data), train_cell_(train_cell), options_(options) {}

  WorkResult run() {
    while (true) {
      const Scan scan = take_one();
      if (scan.took) waiting_ = false;
      if (scan.took && !result_.stopped && !full()) continue;
      // Cells that appear once others have ended: a search's family, a curve's further seeds.
      const bool more_may_come = scan.undecided > 0 && scan.elsewhere > 0;
      if (scan.took || !more_may_come || !options_.wait) {
        count_left();
        return result_;
      }
      if (!waiting_) log(fmt::format("waiting for {} cells that run elsewhere", scan.elsewhere));
      waiting_ = true;
      std::this_thread::sleep_for(std::chrono::duration<double>(options_.poll_seconds));
    }
  }

 private:
  struct Scan {
    bool took = false;
    std::int64_t elsewhere = 0;  // claimed by others
    std::int64_t undecided = 0;  // not known or without a learning rate yet
  };

  bool full() const { return options_.max_cells > 0 && result_.done + result_.failed >= options_.max_cells; }

  bool wanted(const std::string& id) const {
    return options_.only.empty() ||
           std::any_of(options_.only.begin(), options_.only.end(), [&](const std::string& pattern) {
             return ::fnmatch(pattern.c_str(), id.c_str(), 0) == 0;
           });
  }

  // Whether the cell has ended as far as this worker is concerned.
  bool ended(const Cell& cell) {
    if (ended_.contains(cell.id)) return true;
    const std::optional<Row> row = folder_.read_result(cell.id);
    if (!row) return false;
    if (!row->done() && options_.retry_failed && !tried_.contains(cell.id)) return false;
    if (row->done() && cell.lr && row->trained != planned_row(sweep_, cell, data_).trained) {
      throw UserError(fmt::format("{}: cell {} was trained with another config than the sweep file says now.",
                                  folder_.result(cell.id).string(), cell.id),
                      "Put the sweep file back, use another --dir, or remove the cell's result and run "
                      "folder to train it "
                      "again.");
    }
    ended_.insert(cell.id);
    return true;
  }

  // Trains the first cell that is free.
  Scan take_one() {
    Scan scan;
    const Decisions decided = folder_.decide(sweep_);
    scan.undecided = undecided_near_cells(sweep_, decided);
    for (const Cell& cell : cells_of(sweep_, decided)) {
      if (!wanted(cell.id) || ended(cell)) continue;
      if (!cell.lr) {
        ++scan.undecided;
        continue;
      }
      const std::optional<Claim> claim = Claim::take(folder_.claim(cell.id), options_.claims);
      if (!claim) {
        ++scan.elsewhere;
        continue;
      }
      if (ended(cell)) continue;  // its last owner finished between the look and the claim
      train(cell);
      scan.took = true;
      return scan;
    }
    return scan;
  }

  void log(const std::string& line) const {
    if (options_.log) options_.log(line);
  }

  void train(const Cell& cell) {
    tried_.insert(cell.id);
    folder_.remove_result(cell.id);  // of a failure that is tried again
    Row row = planned_row(sweep_, cell, data_);
    log(fmt::format("{}: {} steps, {:.3g} FLOPs, lr {:.3g}", cell.id, row.steps, row.flops, *cell.lr));
    std::string reason;
    bool threw = true;
    try {
      const TrainResult result = train_cell_(config_of(sweep_, cell, data_.vocab), folder_.run(cell.id));
      threw = false;
      if (result.status == RunStatus::Stopped) {
        result_.stopped = true;
        log(fmt::format("{}: stopped after step {} of {}", cell.id, result.state.step, row.steps));
        return;
      }
      if (result.status == RunStatus::Failed) reason = result.message;
    } catch (const DeviceError& e) {
      measure(row, folder_.run(cell.id));
      finish(std::move(row), e.what());
      throw UserError(
          fmt::format("The device failed in cell {}, and cannot be used by this process any more: {}",
                      cell.id, e.what()),
          "The cell is recorded as failed. Start the worker again; --retry-failed gives the cell "
          "another try.");
    } catch (const std::bad_alloc&) {
      reason = "out of memory; a smaller train.micro_batch or train.recompute: block needs less";
    } catch (const std::exception& e) {
      reason = e.what();
    }
    measure(row, folder_.run(cell.id));
    if (reason.empty() && !std::isfinite(row.judged().value_or(NAN)))
      reason = "the last evaluation gave no finite loss";
    finish(std::move(row), reason);
    count_failures(threw, reason);
  }

  void finish(Row row, const std::string& reason) {
    row.status = reason.empty() ? "done" : "failed";
    row.reason = reason;
    folder_.write_result(row);
    ended_.insert(row.cell);
    if (!reason.empty()) {
      ++result_.failed;
      log(fmt::format("{}: failed: {}", row.cell, reason));
      return;
    }
    ++result_.done;
    log(fmt::format("{}: loss {:.4f} in {}", row.cell, *row.judged(),
                    format_duration(row.seconds.value_or(0))));
    if (!sweep_.keep_models) {
      std::error_code ignored;  // what stays costs room and nothing else
      std::filesystem::remove_all(folder_.run(row.cell) / "checkpoints", ignored);
      std::filesystem::remove(folder_.run(row.cell) / "latest", ignored);
    }
  }

  void count_failures(bool threw, const std::string& reason) {
    failures_in_a_row_ = threw ? failures_in_a_row_ + 1 : 0;
    if (failures_in_a_row_ < kFailuresInARow) return;
    throw UserError(fmt::format("{} cells in a row could not be trained; the last one said: {}",
                                failures_in_a_row_, reason),
                    "They are recorded as failed. Mend the reason, then run again with --retry-failed.");
  }

  void count_left() {
    for (const Cell& cell : cells_of(sweep_, folder_.decisions(sweep_))) {
      if (!wanted(cell.id) || folder_.read_result(cell.id)) continue;
      ++result_.left;
      if (claimed_by(folder_.claim(cell.id), options_.claims)) ++result_.elsewhere;
    }
  }

  const Sweep& sweep_;
  const SweepFolder& folder_;
  DataSize data_;
  const TrainCell& train_cell_;
  const WorkOptions& options_;
  WorkResult result_;
  std::set<std::string> ended_, tried_;
  int failures_in_a_row_ = 0;
  bool waiting_ = false;  // and said so
};

}  // namespace

WorkResult work(const Sweep& sweep, const SweepFolder& folder, const DataSize& data,
                const TrainCell& train_cell, const WorkOptions& options) {
  return Worker(sweep, folder, data, train_cell, options).run();
}

}  // namespace fathom::isoflop
