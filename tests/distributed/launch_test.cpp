// What launchers leave in the environment.
#include "train/comm/launch.h"

#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "train/comm/host.h"
#include "train/comm/open_communicator.h"

namespace fathom {
namespace {

Launch launch(const std::map<std::string, std::string>& variables) {
  return read_launch([&](const char* name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

void expect(const Launch& l, Launcher launcher, int rank, int size) {
  EXPECT_EQ(l.launcher, launcher);
  EXPECT_EQ(l.rank, rank);
  EXPECT_EQ(l.size, size);
}

TEST(ThreadsBeside, AreTheRanksOwnCoresOrAShareOfAll) {
  EXPECT_FALSE(allowed_cores().empty());
  EXPECT_EQ(threads_beside({{0, 1, 2, 3}}, 0), 4);
  EXPECT_EQ(threads_beside({{0, 1, 2, 3}, {0, 1, 2, 3}}, 1), 2);
  EXPECT_EQ(threads_beside({{0}, {1}}, 1), 1);
  EXPECT_EQ(threads_beside({{0, 1, 2}, {3}}, 0), 3);
  EXPECT_EQ(threads_beside({{0, 1}, {1, 2}, {2, 3}}, 0), 1);
  EXPECT_EQ(threads_beside({{5}, {5}, {5}}, 2), 1);
  EXPECT_EQ(threads_beside({{}, {}}, 0), 1);
}

TEST(GpuBeside, IsARanksOwn) {
  using Names = std::vector<std::string>;
  const Names all{"a", "b", "c"};
  for (std::size_t r = 0; r < 3; ++r) EXPECT_EQ(gpu_beside({all, all, all}, r), r);
  // A launcher that shows each rank one.
  EXPECT_EQ(gpu_beside({{"b"}, {"a"}}, 0), 0U);
  EXPECT_EQ(gpu_beside({{"b"}, {"a"}}, 1), 0U);
  // Or two, in an order of their own.
  EXPECT_EQ(gpu_beside({{"c", "a"}, {"c", "b"}}, 1), 1U);
  for (std::size_t r = 0; r < 2; ++r) {
    EXPECT_THROW(gpu_beside({{"a"}, {"a"}}, r), UserError);
    EXPECT_THROW(gpu_beside({{"a"}, {}}, r), UserError);
  }
  try {
    gpu_beside({all, all, all, all}, 1);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("4 ranks"));
    EXPECT_THAT(e.what(), ::testing::HasSubstr("3 GPUs"));
  }
}

TEST(ReadLaunch, KnowsItsOwn) {
  // Whatever launcher this program was started by.
  const Launch own = launch({{"FATHOM_RANK", "1"},
                             {"FATHOM_RANKS", "2"},
                             {"FATHOM_PORT", "4711"},
                             {"FATHOM_LISTENER", ""},
                             {"SLURM_STEP_ID", "0"},
                             {"SLURM_PROCID", "0"},
                             {"SLURM_STEP_NUM_TASKS", "1"}});
  expect(own, Launcher::Own, 1, 2);
  EXPECT_EQ(own.master, "127.0.0.1");
  EXPECT_EQ(own.port, 4711);
  EXPECT_EQ(own.listener, -1);
}

TEST(ReadLaunch, KnowsTheLaunchers) {
  expect(launch({}), Launcher::None, 0, 1);
  expect(launch({{"OMPI_COMM_WORLD_RANK", "3"}, {"OMPI_COMM_WORLD_SIZE", "4"}}), Launcher::Mpi, 3, 4);
  expect(launch({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}), Launcher::Mpi, 1, 2);
  std::map<std::string, std::string> torchrun{
      {"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}};
  expect(launch(torchrun), Launcher::Torchrun, 1, 2);
  EXPECT_EQ(launch(torchrun).master, "node1");
  EXPECT_EQ(launch(torchrun).port, 29500);
  torchrun["TORCHELASTIC_USE_AGENT_STORE"] = "True";  // its agent has that port itself
  EXPECT_EQ(launch(torchrun).port, 29501);
  expect(launch({{"SLURM_STEP_ID", "0"},
                 {"SLURM_PROCID", "5"},
                 {"SLURM_STEP_NUM_TASKS", "8"},
                 {"PMI_RANK", "5"},
                 {"PMI_SIZE", "8"}}),
         Launcher::Slurm, 5, 8);
  expect(launch({{"SLURM_STEP_ID", "0"}, {"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "2"}}), Launcher::Slurm, 1,
         2);
  // mpirun inside of an allocation.
  expect(launch({{"SLURM_STEP_ID", "0"},
                 {"SLURM_PROCID", "0"},
                 {"SLURM_STEP_NUM_TASKS", "1"},
                 {"OMPI_COMM_WORLD_RANK", "1"},
                 {"OMPI_COMM_WORLD_SIZE", "2"}}),
         Launcher::Mpi, 1, 2);
}

TEST(ReadLaunch, OneProcessIsAlone) {
  expect(launch({{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "1"}}), Launcher::None, 0, 1);
  // One variable of two is nobody's word.
  expect(launch({{"RANK", "gold"}}), Launcher::None, 0, 1);
  expect(launch({{"WORLD_SIZE", "many"}, {"PMI_RANK", "-1"}}), Launcher::None, 0, 1);
  expect(launch({{"WORLD_SIZE", "2"}}), Launcher::None, 0, 1);
  // A batch script of several tasks, before any srun; and one task of it.
  expect(launch({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}}), Launcher::None, 0, 1);
  expect(launch({{"SLURM_STEP_ID", "0"},
                 {"SLURM_PROCID", "0"},
                 {"SLURM_STEP_NUM_TASKS", "1"},
                 {"SLURM_NTASKS", "8"}}),
         Launcher::None, 0, 1);
}

TEST(ReadLaunch, RefusesWhatIsNoNumber) {
  EXPECT_THROW(launch({{"RANK", "one"}, {"WORLD_SIZE", "2"}}), UserError);
  EXPECT_THROW(launch({{"RANK", "2"}, {"WORLD_SIZE", "2"}}), UserError);
  EXPECT_THROW(launch({{"RANK", "-1"}, {"WORLD_SIZE", "2"}}), UserError);
  EXPECT_THROW(launch({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}}), UserError);
  EXPECT_THROW(launch({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "70000"}}),
               UserError);
}

TEST(OpenCommunicator, OneRankNeedsNobody) {
  const auto alone = open_communicator({});
  EXPECT_TRUE(alone->alone());
  EXPECT_EQ(alone->rank(), 0);
  double x = 3;
  alone->all_reduce({&x, 1, DType::F64});
  EXPECT_EQ(x, 3);
  EXPECT_EQ(sum_over(*alone, 2), 2);
  EXPECT_EQ(text_of_rank_0(*alone, "word"), "word");
  EXPECT_EQ(alone->gather("word"), std::vector<std::string>{"word"});
}

#if !FATHOM_HAVE_MPI
TEST(OpenCommunicator, SaysWhatIsMissing) {
  try {
    open_communicator({Launcher::Mpi, 0, 2, {}, 0});
    FAIL();
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("libopenmpi-dev"));
  }
}
#endif

}  // namespace
}  // namespace fathom
