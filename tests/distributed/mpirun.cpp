#include "tests/distributed/mpirun.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace fathom::testing {

namespace {

namespace fs = std::filesystem;

std::string bytes_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The rank of a process that this launcher started; -1: it is none.
int rank_of(const fs::path& process, pid_t launcher) {
  const std::string stat = bytes_of(process / "stat");  // "PID (NAME) STATE PARENT ..."
  const std::size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos || std::atoi(stat.c_str() + name_end + 4) != launcher) return -1;
  const std::string environment = '\0' + bytes_of(process / "environ");
  for (const char* name : {"OMPI_COMM_WORLD_RANK=", "FATHOM_RANK="}) {
    const std::string key = std::string(1, '\0') + name;
    const std::size_t at = environment.find(key);
    if (at != std::string::npos) return std::atoi(environment.c_str() + at + key.size());
  }
  return -1;
}

std::vector<pid_t> ranks_of(pid_t launcher) {
  std::vector<pid_t> pids;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator("/proc", error)) {
    const int pid = std::atoi(entry.path().filename().c_str());
    const int rank = pid > 0 ? rank_of(entry.path(), launcher) : -1;
    if (rank < 0) continue;
    if (pids.size() <= static_cast<std::size_t>(rank)) pids.resize(static_cast<std::size_t>(rank) + 1);
    pids[static_cast<std::size_t>(rank)] = pid;
  }
  return pids;
}

std::vector<std::string> beginning() {
  return {"env",
          "OMPI_ALLOW_RUN_AS_ROOT=1",
          "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
          "OMPI_MCA_btl_vader_single_copy_mechanism=none",  // containers forbid it, loudly
          "LSAN_OPTIONS=detect_leaks=0",                    // Open MPI keeps some
          "mpirun",
          "--oversubscribe",
          "--bind-to",
          "none"};
}

}  // namespace

std::string why_no_mpi() {
  if (!FATHOM_HAVE_MPI) return "this build has no MPI (FATHOM_MPI)";
  return std::system("command -v mpirun >/dev/null") == 0 ? "" : "there is no mpirun (package openmpi-bin)";
}

std::vector<std::string> mpirun(int ranks, const std::vector<std::string>& command) {
  std::vector<std::string> words = beginning();
  words.insert(words.end(), {"-n", std::to_string(ranks)});
  words.insert(words.end(), command.begin(), command.end());
  return words;
}

std::vector<std::string> mpirun(const std::vector<std::vector<std::string>>& commands) {
  std::vector<std::string> words = beginning();
  for (std::size_t i = 0; i < commands.size(); ++i) {
    if (i > 0) words.emplace_back(":");
    words.insert(words.end(), {"-n", "1"});
    words.insert(words.end(), commands[i].begin(), commands[i].end());
  }
  return words;
}

Ranked::Ranked(const TempFolder& folder, const std::vector<std::string>& words, Gpus gpus)
    : Background(folder, words, gpus) {}

Ranked::~Ranked() {
  if (!running()) return;
  for (const pid_t pid : ranks_of(pid())) {
    if (pid > 0) ::kill(pid, SIGKILL);
  }
}

void Ranked::signal_rank(int rank, int number) {
  const auto at = static_cast<std::size_t>(rank);
  const auto is_there = [&] { return pids_.size() > at && pids_[at] > 0; };
  wait_until(
      [&] {
        if (!is_there()) pids_ = ranks_of(pid());
        return is_there() || !running();
      },
      "a rank");
  ASSERT_TRUE(is_there());
  EXPECT_EQ(::kill(pids_[at], number), 0);
}

void Ranked::await_end_of(int rank) {
  const pid_t pid = pids_.at(static_cast<std::size_t>(rank));
  wait_until([&] { return ::kill(pid, 0) != 0 || !running(); }, "a rank's end");
}

Outcome fathom_ranks(const TempFolder& folder, int ranks, const std::string& arguments) {
  Ranked run(folder, mpirun(ranks, words_of(arguments)));
  return run.wait();
}

}  // namespace fathom::testing
