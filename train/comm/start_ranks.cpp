#include "train/comm/start_ranks.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "train/comm/launch.h"
#include "train/comm/wire.h"

namespace fathom {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// timeout(1) signals a process and then its group: two signals for one wish (train/signals.cpp).
constexpr milliseconds kSameRequest{100};
// Ranks that lose another one end within ten seconds (watch.h); those that have not met yet do not know.
constexpr milliseconds kToEndByThemselves{15000};

struct Started {
  pid_t pid = -1;
  std::optional<int> status;  // of waitpid, once it has ended
  bool ended_well() const { return status && WIFEXITED(*status) && WEXITSTATUS(*status) == 0; }
  bool told() const { return status && WIFEXITED(*status) && WEXITSTATUS(*status) != 0; }
};

struct Failure {
  std::size_t rank = 0;
  Clock::time_point seen;
};

[[noreturn]] void refuse_start(int rank, int why) {
  throw UserError(fmt::format("The system starts no process for rank {}: {}.", rank, std::strerror(why)),
                  "Its limit of processes, of memory or of the size of arguments is reached, or this "
                  "program's file cannot be run any more.");
}

// What a process that has not become another program says of it: an errno. Nothing, once it has become one,
// as its end of the pipe is closed then.
class Refusal {
 public:
  Refusal() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0)
      throw UserError(fmt::format("The system gives no pipe to start a rank by: {}.", std::strerror(errno)));
    read_ = Descriptor(ends[0]);
    write_ = Descriptor(ends[1]);
  }
  // In the new process.
  void say(int why) const { [[maybe_unused]] const ssize_t n = ::write(write_.get(), &why, sizeof why); }
  // In this one; 0: nothing was said.
  int hear() {
    write_ = Descriptor();
    int why = 0;
    ssize_t n = 0;
    do n = ::read(read_.get(), &why, sizeof why);
    while (n < 0 && errno == EINTR);
    return n == sizeof why ? why : 0;
  }

 private:
  Descriptor read_, write_;
};

std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  if (words.empty()) throw UserError("/proc/self/cmdline cannot be read, so no ranks can be started.");
  return words;
}

// This process's variables, less those of `more`, and those.
std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::string>>& more) {
  std::vector<std::string> all;
  for (char** at = environ; *at != nullptr; ++at) {
    const std::string_view variable = *at;
    bool replaced = false;
    for (const auto& [name, value] : more) replaced |= variable.starts_with(name + "=");
    if (!replaced) all.emplace_back(variable);
  }
  for (const auto& [name, value] : more) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers_to(std::vector<std::string>& words) {
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  return pointers;
}

// Signals that are waited for, and so blocked while this lives.
class WaitedSignals {
 public:
  WaitedSignals() {
    ::sigemptyset(&set_);
    for (const int signal : {SIGTERM, SIGINT, SIGQUIT, SIGTSTP, SIGCHLD}) ::sigaddset(&set_, signal);
    struct sigaction hangup {};
    ::sigaction(SIGHUP, nullptr, &hangup);
    if (hangup.sa_handler != SIG_IGN) ::sigaddset(&set_, SIGHUP);  // nohup(1) means it
    struct sigaction plain {};
    plain.sa_handler = SIG_DFL;
    ::sigaction(SIGCHLD, &plain, &child_before_);
    ::sigprocmask(SIG_BLOCK, &set_, &before_);
  }
  ~WaitedSignals() {
    ::sigprocmask(SIG_SETMASK, &before_, nullptr);
    ::sigaction(SIGCHLD, &child_before_, nullptr);
  }
  WaitedSignals(const WaitedSignals&) = delete;
  WaitedSignals& operator=(const WaitedSignals&) = delete;

  const sigset_t& mask_before() const { return before_; }
  /// The next one, or 0 after `limit`.
  int next(milliseconds limit) const {
    const timespec time{limit.count() / 1000, limit.count() % 1000 * 1'000'000};
    const int signal = ::sigtimedwait(&set_, nullptr, &time);
    return signal > 0 ? signal : 0;
  }

 private:
  sigset_t set_{};
  sigset_t before_{};
  struct sigaction child_before_ {};
};

class Group {
 public:
  explicit Group(int ranks) : ranks_(static_cast<std::size_t>(ranks)) {}
  ~Group() {
    signal_all(SIGKILL);
    for (Started& s : ranks_) {
      if (s.pid > 0 && !s.status) ::waitpid(s.pid, nullptr, 0);
    }
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  void start() {
    const Listener listener = listen_anywhere(true);
    for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) start(r, listener);
  }

  int wait() {
    std::optional<Clock::time_point> last_request;
    for (reap(); !all_have_ended(); reap()) {
      if (first_failed_ && Clock::now() > first_failed_->seen + kToEndByThemselves) signal_all(SIGKILL);
      const int signal = signals_.next(first_failed_ ? milliseconds(100) : milliseconds(10000));
      if (signal == SIGTSTP) {
        signal_all(SIGSTOP);
        ::raise(SIGSTOP);
        signal_all(SIGCONT);
      } else if (signal != 0 && signal != SIGCHLD) {
        const Clock::time_point now = Clock::now();
        if (last_request && now - *last_request < kSameRequest) continue;
        last_request = now;
        passed_on_.insert(signal);
        signal_all(signal);
      }
    }
    return status();
  }

 private:
  void start(int rank, const Listener& listener) {
    std::vector<std::pair<std::string, std::string>> variables{
        {kOwnRank, std::to_string(rank)},
        {kOwnRanks, std::to_string(ranks_.size())},
        {kOwnPort, std::to_string(listener.port)},
        {kOwnListener, rank == 0 ? std::to_string(listener.socket.get()) : ""}};
    std::vector<std::string> words = own_arguments(), environment = environment_with(variables);
    const std::vector<char*> argv = pointers_to(words), envp = pointers_to(environment);
    const pid_t parent = ::getpid();
    Refusal refusal;
    const pid_t pid = ::fork();
    if (pid < 0) refuse_start(rank, errno);
    if (pid == 0) {
      // Only what is safe between fork and exec. A group of its own, so that what a terminal or a launcher
      // sends to this one's reaches it once, by way of this process; and it may go on writing to a terminal.
      ::setpgid(0, 0);
      ::signal(SIGTTOU, SIG_IGN);
      ::prctl(PR_SET_PDEATHSIG, SIGTERM);
      if (rank == 0) ::fcntl(listener.socket.get(), F_SETFD, 0);
      ::sigprocmask(SIG_SETMASK, &signals_.mask_before(), nullptr);
      if (::getppid() == parent) {
        ::execve("/proc/self/exe", argv.data(), envp.data());
        refusal.say(errno);
      }
      ::_exit(127);
    }
    ranks_[static_cast<std::size_t>(rank)].pid = pid;
    if (const int why = refusal.hear(); why != 0) refuse_start(rank, why);
  }

  void signal_all(int signal) {
    for (const Started& s : ranks_) {
      if (s.pid > 0 && !s.status) ::kill(s.pid, signal);
    }
  }

  void reap() {
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      Started& s = ranks_[r];
      int status = 0;
      if (s.status || ::waitpid(s.pid, &status, WNOHANG) != s.pid) continue;
      s.status = status;
      if (!s.ended_well() && !first_failed_) first_failed_ = Failure{.rank = r, .seen = Clock::now()};
    }
  }

  bool all_have_ended() const {
    bool all = true;
    for (const Started& s : ranks_) all &= s.status.has_value();
    return all;
  }

  // Those that ended behind the first one may have been killed because it had.
  int status() const {
    if (!first_failed_) return 0;
    const Started& first = ranks_[first_failed_->rank];
    if (first.told()) return WEXITSTATUS(*first.status);
    const int signal = WTERMSIG(*first.status);
    if (passed_on_.contains(signal)) return 128 + signal;
    for (const Started& s : ranks_) {
      if (s.told()) return WEXITSTATUS(*s.status);
    }
    throw UserError(fmt::format("Rank {} (process {}) was killed by signal {} ({}), and the others with it.",
                                first_failed_->rank, first.pid, signal, ::strsignal(signal)),
                    "What was saved stays: the same command with --resume auto goes on from the last "
                    "checkpoint.");
  }

  WaitedSignals signals_;
  std::vector<Started> ranks_;
  std::optional<Failure> first_failed_;
  std::set<int> passed_on_;  // signals
};

}  // namespace

int start_ranks(int ranks, const std::function<void()>& first) {
  Group group(ranks);  // which blocks the signals
  first();
  group.start();
  return group.wait();
}

}  // namespace fathom
