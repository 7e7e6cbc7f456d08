#include "tests/system/cli.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <thread>

#include <fcntl.h>
#include <sys/wait.h>

#include "src/io/hdf5_file.h"
#include "src/io/prepare.h"
#include "src/io/synthetic_text.h"
#include "train/run_folder.h"

namespace fathom::testing {

namespace {

// The model is tiny on purpose; with its own thread count and no spinning threads, tests do not disturb each
// other.
constexpr const char* kDense = R"(
model: {width: 32, depth: 4, heads: 2, ffn_hidden: 64}
data: {train: train.h5, valid: train.valid.h5}
train: {seq_len: 32, batch_tokens: 256, micro_batch: 4, steps: 40, lr: 3e-3, log_every: 1, eval_every: 6,
        eval_tokens: 512, checkpoint_every: 7}
)";
constexpr const char* kMod = R"(
model: {width: 32, depth: 4, heads: 2, ffn_hidden: 64}
routing: {kind: mod, capacity: 0.25, causal: {method: both}}
data: {train: train.h5, valid: train.valid.h5}
train: {seq_len: 32, batch_tokens: 256, micro_batch: 4, steps: 40, lr: 3e-3, log_every: 1, eval_every: 6,
        eval_tokens: 512, checkpoint_every: 7}
)";

constexpr const char* kMode = R"(
model: {width: 32, depth: 4, heads: 2, ffn_hidden: 64}
routing: {kind: mode_staged, capacity: 0.5, causal: {method: both}}
experts: {count: 2}
data: {train: train.h5, valid: train.valid.h5}
train: {seq_len: 32, batch_tokens: 256, micro_batch: 4, steps: 40, lr: 3e-3, log_every: 1, eval_every: 6,
        eval_tokens: 512, checkpoint_every: 7}
)";

constexpr const char* kMoe = R"(
model: {width: 32, depth: 4, heads: 2, ffn_hidden: 64}
routing: {kind: moe, causal: {method: both}}
experts: {count: 2}
data: {train: train.h5, valid: train.valid.h5}
train: {seq_len: 32, batch_tokens: 256, micro_batch: 4, steps: 40, lr: 3e-3, log_every: 1, eval_every: 6,
        eval_tokens: 512, checkpoint_every: 7}
)";

constexpr const char* kDocuments = R"(
model: {width: 32, depth: 4, heads: 2, ffn_hidden: 64}
routing: {kind: mod, capacity: 0.25, causal: {method: predictor}}
data: {train: train.h5, valid: train.valid.h5, document_mask: true}
train: {seq_len: 32, batch_tokens: 256, micro_batch: 4, steps: 40, lr: 3e-3, log_every: 1, eval_every: 6,
        eval_tokens: 512, checkpoint_every: 7}
)";

constexpr const char* kStochastic = R"(
model: {width: 32, depth: 4, heads: 2, ffn_hidden: 64}
routing: {kind: mod, capacity: 0.25, selection: stochastic, causal: {method: predictor}}
data: {train: train.h5, valid: train.valid.h5}
train: {seq_len: 32, batch_tokens: 256, micro_batch: 4, steps: 40, lr: 3e-3, log_every: 1, eval_every: 6,
        eval_tokens: 512, checkpoint_every: 7}
)";

int exit_status(int status) {
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : -1000;
}

template <typename T>
std::string bits(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

}  // namespace

std::vector<std::string> words_of(const std::string& arguments) {
  std::vector<std::string> words{FATHOM_BINARY};
  std::istringstream stream(arguments);
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

nlohmann::json Outcome::json() const {
  EXPECT_EQ(status, 0) << err;
  nlohmann::json parsed = nlohmann::json::parse(out, nullptr, false);
  EXPECT_TRUE(parsed.is_object()) << "standard output is not one JSON object: " << out;
  return parsed.is_object() ? parsed : nlohmann::json::object();
}

Outcome fathom_command(const TempFolder& folder, const std::string& arguments, const std::string& before) {
  const std::string out = folder / "stdout";
  const std::string err = folder / "stderr";
  const std::string line =
      "cd '" + folder.path() +
      "' && gpus=${CUDA_VISIBLE_DEVICES-all} && export OMP_WAIT_POLICY=passive CUDA_VISIBLE_DEVICES=; " +
      before + " '" FATHOM_BINARY "' " + arguments + " >'" + out + "' 2>'" + err + "'";
  const int status = std::system(line.c_str());
  return {exit_status(status), read_bytes(out), read_bytes(err)};
}

void expect_refusal(const Outcome& outcome, int status, std::initializer_list<std::string> words) {
  EXPECT_EQ(outcome.status, status) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  const std::size_t start = outcome.err.rfind("fathom: ");
  ASSERT_NE(start, std::string::npos) << outcome.err;
  const std::string paragraph = outcome.err.substr(start);
  EXPECT_EQ(paragraph.find('\n'), paragraph.size() - 1) << "not one paragraph: " << paragraph;
  EXPECT_EQ(paragraph.find("internal error"), std::string::npos) << paragraph;
  for (const std::string& word : words) {
    EXPECT_NE(paragraph.find(word), std::string::npos) << "\"" << word << "\" is missing in: " << paragraph;
  }
}

Background::Background(const TempFolder& folder, const std::string& arguments, Gpus gpus)
    : Background(folder, words_of(arguments), gpus) {}

Background::Background(const TempFolder& folder, std::vector<std::string> words, Gpus gpus,
                       const std::string& name)
    : out_(folder / (name + ".out")), err_(folder / (name + ".err")) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const std::string path = folder.path();
  pid_ = ::fork();
  if (pid_ != 0) return;
  const int out = ::open(out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  const int err = ::open(err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  ::setenv("OMP_WAIT_POLICY", "passive", 1);
  if (gpus == Gpus::None) ::setenv("CUDA_VISIBLE_DEVICES", "", 1);
  if (out >= 0 && err >= 0 && ::dup2(out, 1) == 1 && ::dup2(err, 2) == 2 && ::chdir(path.c_str()) == 0) {
    ::execvp(argv[0], argv.data());
  }
  ::_exit(127);
}

Background::~Background() {
  if (done_) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

void Background::signal(int number) const { EXPECT_EQ(::kill(pid_, number), 0); }

bool Background::running() {
  if (!done_ && ::waitpid(pid_, &status_, WNOHANG) == pid_) done_ = true;
  return !done_;
}

bool Background::said(const std::string& text) const {
  return read_bytes(err_).find(text) != std::string::npos;
}

Outcome Background::wait() {
  if (!done_ && ::waitpid(pid_, &status_, 0) != pid_) ADD_FAILURE() << "waitpid failed";
  done_ = true;
  return {exit_status(status_), read_bytes(out_), read_bytes(err_)};
}

void wait_until(const std::function<bool()>& condition, const char* what) {
  for (int i = 0; i < 30000; ++i) {
    if (condition()) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  FAIL() << "waited in vain for " << what;
}

Experiment::Experiment() {
  write_synthetic_text(*this / "text.jsonl", 60000, 3);
  PrepareOptions options;
  options.inputs = {*this / "text.jsonl"};
  options.output = *this / "train.h5";
  options.valid_fraction = 0.1;
  options.threads = 1;
  prepare(options);
  write_bytes(*this / "dense.yaml", kDense);
  write_bytes(*this / "mod.yaml", kMod);
  write_bytes(*this / "mode.yaml", kMode);
  write_bytes(*this / "moe.yaml", kMoe);
  write_bytes(*this / "documents.yaml", kDocuments);
  write_bytes(*this / "stochastic.yaml", kStochastic);
}

std::string Experiment::train(const std::string& kind, const std::string& run, const std::string& more) {
  return "train " + kind + ".yaml --run-dir " + run + " --threads 1 " + more;
}

void Experiment::trained(const std::string& kind, const std::string& run, const std::string& more,
                         const std::string& before) const {
  const Outcome outcome = fathom_command(*this, train(kind, run, more), before);
  ASSERT_EQ(outcome.status, 0) << outcome.err;
}

Metrics Experiment::metrics(const std::string& run) const {
  return read_metrics(*this / (run + "/metrics.jsonl"));
}

std::vector<nlohmann::json> Experiment::lines(const std::string& run) const {
  std::vector<nlohmann::json> all;
  std::istringstream in(read_bytes(*this / (run + "/metrics.jsonl")));
  for (std::string line; std::getline(in, line);) all.push_back(nlohmann::json::parse(line));
  return all;
}

std::string Experiment::newest_checkpoint(const std::string& run) const {
  const auto files = list_checkpoints(*this / run);
  return files.empty() ? "" : files.back().path.string();
}

std::vector<std::string> computed(const Experiment& e, const std::string& run) {
  std::vector<std::string> all;
  for (nlohmann::json line : e.lines(run)) {
    if (line.contains("event")) continue;
    for (const char* of_the_clock : {"seconds", "tokens_per_s", "flops_per_s", "mfu", "memory_bytes",
                                     "memory_held_bytes", "device_used_bytes"})
      line.erase(of_the_clock);
    all.push_back(line.dump());
  }
  return all;
}

std::vector<std::string> content(const std::string& checkpoint) {
  const H5Reader file(checkpoint, kCheckpointKind);
  std::vector<std::string> all;
  for (const char* group : {"parameters", "optimizer/m", "optimizer/v"}) {
    for (const std::string& name : file.list(group)) {
      const std::string path = std::string(group) + "/" + name;
      all.push_back(path + " " + bits(file.read<float>(path)));
    }
  }
  for (const char* name :
       {"step", "tokens", "sequences", "steps_averaged", "skipped_in_a_row", "best_step"}) {
    all.push_back(std::string(name) + " " + std::to_string(file.get_int(name)));
  }
  for (const char* name : {"flops", "loss_average", "best_val_loss"}) {
    all.push_back(std::string(name) + " " + bits(std::vector<double>{file.get_double(name)}));
  }
  return all;
}

void expect_same_run(const Experiment& e, const std::string& a, const std::string& b) {
  const std::vector<std::string> lines_a = computed(e, a);
  const std::vector<std::string> lines_b = computed(e, b);
  ASSERT_EQ(lines_a.size(), lines_b.size());
  for (std::size_t i = 0; i < lines_a.size(); ++i) ASSERT_EQ(lines_a[i], lines_b[i]);
  const std::vector<std::string> x = content(e.newest_checkpoint(a));
  const std::vector<std::string> y = content(e.newest_checkpoint(b));
  ASSERT_EQ(x.size(), y.size());
  EXPECT_GT(x.size(), 20u);
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_TRUE(x[i] == y[i]) << "differs: " << x[i].substr(0, x[i].find(' '));
  }
}

}  // namespace fathom::testing
