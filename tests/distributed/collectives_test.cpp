// The collectives of MPI, in ranks of this very program; and how the arenas are shared out.
#include <atomic>
#include <cmath>
#include <filesystem>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/model/transformer.h"
#include "tests/distributed/kinds.h"
#include "tests/distributed/mpirun.h"
#include "tests/distributed/thread_ranks.h"
#include "train/comm/bf16.h"
#include "train/comm/launch.h"
#include "train/comm/open_communicator.h"
#include "train/comm/rank_error.h"
#include "train/comm/tcp_communicator.h"
#include "train/comm/wire.h"
#include "train/ranks.h"
#include "train/shards.h"

namespace fathom {
namespace {

// What every communicator does.
void expect_collectives(Communicator& comm) {
  const int n = comm.size(), rank = comm.rank();
  const auto other = [](int r, std::size_t i) { return 0.1 * (r + 1) + static_cast<double>(i); };
  const auto sum_of = [&](std::size_t i) {
    double sum = 0;
    for (int r = 0; r < n; ++r) sum += other(r, i);
    return sum;
  };
  std::vector<double> x(1000);
  std::vector<float> y(1000);
  const auto fill = [&] {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = other(rank, i), y[i] = static_cast<float>(x[i]);
  };
  fill();
  comm.all_reduce({x.data(), 1000, DType::F64});
  comm.all_reduce({y.data(), 1000, DType::F32});
  comm.finish();
  for (std::size_t i = 0; i < x.size(); ++i) {
    ASSERT_NEAR(x[i], sum_of(i), 1e-12 * sum_of(i));
    ASSERT_NEAR(y[i], sum_of(i), 1e-6 * sum_of(i));
  }
  // Parts of several sizes, one of them empty.
  std::vector<std::int64_t> counts(static_cast<std::size_t>(n), 0);
  counts[0] = 300;
  counts.back() += 700;
  fill();
  comm.reduce_scatter({x.data(), 1000, DType::F64}, counts);
  comm.finish();
  const auto at = static_cast<std::size_t>(offset_of(counts, rank));
  const auto own = static_cast<std::size_t>(counts[static_cast<std::size_t>(rank)]);
  for (std::size_t i = at; i < at + own; ++i) ASSERT_NEAR(x[i], sum_of(i), 1e-12 * sum_of(i));
  comm.all_gather({x.data(), 1000, DType::F64}, counts);
  comm.finish();
  for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], sum_of(i), 1e-12 * sum_of(i)) << i;

  fill();
  comm.broadcast({x.data(), 1000, DType::F64}, n - 1);
  comm.finish();
  for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(x[i], other(n - 1, i));

  EXPECT_EQ(sum_over(comm, rank + 1), n * (n + 1) / 2);
  EXPECT_EQ(max_over(comm, rank), n - 1);
  EXPECT_EQ(value_of_rank_0(comm, rank + 7), 7);
  EXPECT_EQ(text_of_rank_0(comm, std::string(static_cast<std::size_t>(rank), 'x')), "");
  EXPECT_EQ(text_of_rank_0(comm, rank == 0 ? "what rank 0 says" : "nothing"), "what rank 0 says");
  const std::vector<std::string> all = comm.gather(std::string(static_cast<std::size_t>(rank), 'a'));
  ASSERT_EQ(all.size(), static_cast<std::size_t>(n));
  for (int r = 0; r < n; ++r) EXPECT_EQ(all[static_cast<std::size_t>(r)].size(), static_cast<std::size_t>(r));
  EXPECT_EQ(comm.local_size(), n);
  EXPECT_EQ(comm.local_rank(), rank);
  comm.barrier();
}

TEST(Collectives, OfThreads) {
  testing::run_as_ranks(3, [](const std::shared_ptr<Communicator>& comm) { expect_collectives(*comm); });
}

// bf16 is added up in fp32: 2^-8 of each other rank would be lost in bf16.
void expect_sums_of_bf16(Communicator& comm) {
  std::vector<std::uint16_t> bits(4);
  const View view{bits.data(), 4, DType::BF16};
  const std::vector<float> mine(4, comm.rank() == 0 ? 1.0F : 0x1p-8F);
  std::vector<float> sum(4);
  const float exact = 1.0F + 0x1p-8F * static_cast<float>(comm.size() - 1);
  to_bf16(view, mine);
  comm.all_reduce(view);
  to_fp32(sum, view);
  for (const float s : sum) EXPECT_LE(std::abs(s - exact), 0x1p-8F);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(comm.size()), 0);
  counts.back() = 4;
  to_bf16(view, mine);
  comm.reduce_scatter(view, counts);
  to_fp32(sum, view);
  if (comm.rank() < comm.size() - 1) return;
  for (const float s : sum) EXPECT_LE(std::abs(s - exact), 0x1p-8F);
}

// As ranks of TCP, in threads of this process.
void meet_by_tcp(int size, const std::vector<int>& ranks, double timeout,
                 const std::function<void(Communicator&)>& body) {
  const int port = listen_anywhere(true).port;  // free, a moment ago
  std::vector<std::thread> threads;
  for (const int rank : ranks) {
    threads.emplace_back([&, rank] {
      try {
        const Launch launch{Launcher::Torchrun, rank, size, "localhost", port};
        const auto comm = make_tcp_communicator(launch, timeout);
        body(*comm);
      } catch (const RankError& e) {
        if (rank == 0) {
          EXPECT_EQ(std::string(e.what()).find("Rank 1 of 3 has not come"), 0U) << e.what();
        } else if (ranks.size() == 1) {
          EXPECT_EQ(std::string(e.what()).find("Rank 1 of 2 waited"), 0U) << e.what();
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
}

TEST(Collectives, OfTcp) {
  for (const int n : {2, 3}) {
    std::vector<int> ranks(static_cast<std::size_t>(n));
    std::iota(ranks.begin(), ranks.end(), 0);
    std::atomic<int> through{0};
    meet_by_tcp(n, ranks, 60, [&](Communicator& comm) {
      expect_collectives(comm);
      expect_sums_of_bf16(comm);
      ++through;
    });
    EXPECT_EQ(through, n);
  }
}

TEST(Collectives, OfTcpNameTheMissingRank) {
  const auto nobody = [](Communicator&) { ADD_FAILURE() << "nobody is missed"; };
  meet_by_tcp(3, {0, 2}, 0.3, nobody);
  meet_by_tcp(2, {1}, 0.3, nobody);
}

// Run by mpirun, below.
TEST(InARank, Collectives) {
  const Launch launch = read_launch(process_environment());
  if (launch.launcher != Launcher::Mpi) GTEST_SKIP() << "mpirun starts this one (Collectives.OfMpi)";
  const auto comm = open_communicator(launch);
  expect_collectives(*comm);
  expect_sums_of_bf16(*comm);
}

TEST(Collectives, OfMpi) {
  SKIP_WITHOUT_MPI();
  const testing::TempFolder folder;
  const std::string this_program = std::filesystem::read_symlink("/proc/self/exe");
  for (const int ranks : {2, 3}) {
    testing::Ranked run(folder, testing::mpirun(ranks, {this_program, "--gtest_color=no",
                                                        "--gtest_filter=InARank.Collectives"}));
    const testing::Outcome outcome = run.wait();
    EXPECT_EQ(outcome.status, 0) << outcome.out << outcome.err;
    EXPECT_EQ(outcome.out.find("SKIPPED"), std::string::npos) << outcome.out;
    EXPECT_NE(outcome.out.find("[  PASSED  ] 1 test"), std::string::npos) << outcome.out;
  }
}

TEST(Bf16, RoundsToTheNearest) {
  const std::vector<float> x{1.0F, 1 + 0x1p-8F, 1 + 3 * 0x1p-8F, 1 + 0x1p-8F + 0x1p-23F, INFINITY,
                             NAN,  -0.0F};
  std::vector<std::uint16_t> bits(x.size());
  to_bf16({bits.data(), static_cast<std::int64_t>(x.size()), DType::BF16}, x);
  EXPECT_EQ(bits[0], 0x3f80);
  EXPECT_EQ(bits[1], 0x3f80);
  EXPECT_EQ(bits[2], 0x3f82);
  EXPECT_EQ(bits[3], 0x3f81);
  EXPECT_EQ(bits[4], 0x7f80);
  EXPECT_GT(bits[5] & 0x7fff, 0x7f80);
  EXPECT_EQ(bits[6], 0x8000);
}

TEST(Shards, CoverTheArenasOnce) {
  Context c(make_cpu_backend({}, 1), DType::F32);
  for (const testing::Kind& kind : testing::all_kinds()) {
    const Transformer model(c, kind.config.model, kind.config.routing, true);
    const ParameterSet& p = model.parameters();
    for (const int ranks : {1, 2, 3, 8, 100}) {
      for (const std::int64_t bucket : {std::int64_t{1}, std::int64_t{1500}, kBucketElements}) {
        std::vector<int> owners(static_cast<std::size_t>(p.masters().size()));
        std::int64_t most = 0, least = p.masters().size();
        for (int r = 0; r < ranks; ++r) {
          const Shards shards(p, r, ranks, bucket);
          std::int64_t moments = 0;
          for (const Shards::Bucket& b : shards.buckets()) {
            EXPECT_EQ(b.moments, moments);
            moments += b.own.size;
            EXPECT_EQ(offset_of(b.counts, ranks), b.range.size);
            EXPECT_GE(b.own.begin, p.range(b.group).begin);
            EXPECT_LE(b.own.begin + b.own.size, p.range(b.group).begin + p.range(b.group).size);
            for (std::int64_t i = 0; i < b.own.size; ++i) ++owners[static_cast<std::size_t>(b.own.begin + i)];
          }
          EXPECT_EQ(shards.owned(), moments);
          EXPECT_EQ(shards.elements(), p.masters().size());
          most = std::max(most, moments);
          least = std::min(least, moments);
        }
        EXPECT_EQ(owners, std::vector<int>(owners.size(), 1));
        EXPECT_LE(most - least, bucket == kBucketElements ? 3 * 128 : p.masters().size());
      }
    }
  }
}

TEST(ShareOf, IsAnEqualPart) {
  Config c = testing::all_kinds()[0].config;  // 8 sequences of 16 tokens
  const auto share = [&](int ranks) { return share_of(c, ranks).train; };
  EXPECT_EQ(share(1).batch_tokens, 128);
  EXPECT_EQ(share(2).batch_tokens, 64);
  EXPECT_EQ(share(2).micro_batch, 4);
  c.train.micro_batch = 2;
  EXPECT_EQ(share(2).micro_batch, 2);
  EXPECT_EQ(share(8).micro_batch, 1);
  EXPECT_THROW(share(3), UsageError);
  EXPECT_THROW(share(16), UsageError);
  c.train.batch_tokens = 16 * 12;
  c.train.micro_batch = 4;
  EXPECT_EQ(share(3).micro_batch, 4);
  EXPECT_THROW(share(2), UsageError);  // 6 in micro-batches of 4
}

TEST(SlowRank, IsTheOneThatTheOthersWaitFor) {
  EXPECT_EQ(slow_rank({1.0}), std::nullopt);
  EXPECT_EQ(slow_rank({1.0, 1.4}), std::nullopt);
  EXPECT_EQ(slow_rank({1.0, 1.6}), 1);
  EXPECT_EQ(slow_rank({3.0, 1.0, 1.1, 0.9}), 0);
  EXPECT_EQ(slow_rank({1.0, 1.0, 1.0, 1.0}), std::nullopt);
}

}  // namespace
}  // namespace fathom
