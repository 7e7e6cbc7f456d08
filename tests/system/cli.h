// The binary as a user runs it: commands with their output and status, trainings in the background to be
// signalled, and a tiny experiment (text, stores, configs) of a second's training.
#pragma once

#include <csignal>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <sys/types.h>

#include "tests/io/temp.h"
#include "train/metrics/metrics_log.h"

namespace fathom::testing {

struct Outcome {
  int status = -1;  // exit status; -N: killed by signal N
  std::string out;
  std::string err;

  /// Standard output as one JSON object; a test failure when it is anything else.
  nlohmann::json json() const;
};

/// Runs `fathom ARGUMENTS` in `folder` and waits. `before` is shell text in front of it ("ulimit -f 64;"). It
/// sees no GPU, if this machine has one: a test does the same everywhere. kWithGpu in front shows those that
/// the test itself sees.
inline constexpr const char* kWithGpu =
    "if [ \"$gpus\" = all ]; then unset CUDA_VISIBLE_DEVICES; else CUDA_VISIBLE_DEVICES=$gpus; fi;";
Outcome fathom_command(const TempFolder& folder, const std::string& arguments,
                       const std::string& before = "");

/// A command that must fail: its status, nothing on standard output, one paragraph on standard error with
/// `words`.
void expect_refusal(const Outcome& outcome, int status, std::initializer_list<std::string> words);

/// The words of the command `fathom ARGUMENTS`.
std::vector<std::string> words_of(const std::string& arguments);

/// `fathom ARGUMENTS` in the background.
class Background {
 public:
  enum class Gpus : std::uint8_t { None, Ours };
  /// It sees no GPU, or those that the test itself sees.
  Background(const TempFolder& folder, const std::string& arguments, Gpus gpus = Gpus::None);
  /// Any program, found on PATH; what it says goes to files of this name.
  Background(const TempFolder& folder, std::vector<std::string> words, Gpus gpus = Gpus::None,
             const std::string& name = "background");
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  void signal(int number) const;
  pid_t pid() const { return pid_; }
  bool running();
  /// Whether this stands in what it wrote to standard error so far.
  bool said(const std::string& text) const;
  Outcome wait();

 private:
  std::string out_, err_;
  pid_t pid_ = -1;
  int status_ = 0;
  bool done_ = false;
};

/// Polls every 2 ms for up to a minute; a test failure when `condition` never holds.
void wait_until(const std::function<bool()>& condition, const char* what);

/// A folder with text.jsonl, train.h5 and train.valid.h5 (bytes), dense.yaml and mod.yaml (routed, causal:
/// both, with gradient accumulation), mode.yaml, moe.yaml, documents.yaml (routed, with document masks)
/// and stochastic.yaml (routed at random).
/// One training of it takes a fraction of a second.
class Experiment : public TempFolder {
 public:
  Experiment();

  /// "train KIND.yaml --run-dir RUN --threads 1 MORE"
  static std::string train(const std::string& kind, const std::string& run, const std::string& more = "");
  /// Trains to the end; a test failure when that fails.
  void trained(const std::string& kind, const std::string& run, const std::string& more = "",
               const std::string& before = "") const;

  Metrics metrics(const std::string& run) const;
  std::vector<nlohmann::json> lines(const std::string& run) const;  // of metrics.jsonl
  std::string newest_checkpoint(const std::string& run) const;
};

/// 100 steps that learn so little that a batch a little harder than those before it is a spike, now and then.
inline constexpr const char* kSkipsNowAndThen =
    "--set train.schedule=constant --set train.warmup=1 --set train.lr=1e-5 --set "
    "train.spike_factor=1.000001 "
    "--set train.on_spike=skip --set train.steps=100 --set train.log_every=1";

/// What a run computed, without what depends on the clock: every step's and evaluation's numbers.
std::vector<std::string> computed(const Experiment& e, const std::string& run);
/// Every number of a checkpoint but the seconds, for comparison to the bit.
std::vector<std::string> content(const std::string& checkpoint);
/// Two runs computed the same to the bit: metrics, parameters, moments, state.
void expect_same_run(const Experiment& e, const std::string& a, const std::string& b);

}  // namespace fathom::testing
