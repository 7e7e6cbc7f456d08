#include "train/comm/tcp_communicator.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include "kernels/error.h"
#include "train/comm/bf16.h"
#include "train/comm/rank_error.h"
#include "train/comm/watched_communicator.h"
#include "train/comm/wire.h"

namespace fathom {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kLook{50};  // after others, while a rank waits

// What a rank says first, so that nobody else's connection is taken for it.
struct Greeting {
  char name[8] = {'f', 'a', 't', 'h', 'o', 'm', '0', '1'};
  std::int32_t rank = 0;
  std::int32_t size = 0;
};

std::span<std::byte> bytes_of(View v) {
  return {static_cast<std::byte*>(v.data), static_cast<std::size_t>(v.size) * size_of(v.dtype)};
}

template <typename T>
void add(std::span<std::byte> to, std::span<const std::byte> from) {
  auto* sum = reinterpret_cast<T*>(to.data());
  const auto* more = reinterpret_cast<const T*>(from.data());
  for (std::size_t i = 0; i < to.size() / sizeof(T); ++i) sum[i] += more[i];
}

class TcpCommunicator final : public WatchedCommunicator {
 public:
  TcpCommunicator(const Launch& launch, double timeout)
      : address_(fmt::format("{}:{}", launch.master, launch.port)) {
    set_rank(launch.rank, launch.size);
    const Clock::time_point end =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout));
    if (launch.rank == 0) {
      await_others(launch, end, timeout);
    } else {
      find_rank_0(launch, end, timeout);
    }
    begin_watch();
  }
  ~TcpCommunicator() override { end_watch(); }

  std::string description() const override {
    return fmt::format("{} ranks by TCP through rank 0 ({})", size(), address_);
  }

  void all_reduce(View values) override {
    if (values.dtype == DType::BF16) {
      std::vector<float> room(static_cast<std::size_t>(values.size));
      to_fp32(room, values);
      all_reduce({room.data(), values.size, DType::F32});
      to_bf16(values, room);
      return;
    }
    const InCollective waiting(*this);
    sum_at_rank_0(values);
    from_rank_0(bytes_of(values));
  }

  void reduce_scatter(View values, std::span<const std::int64_t> counts) override {
    if (values.dtype == DType::BF16) {
      std::vector<float> room(static_cast<std::size_t>(values.size));
      to_fp32(room, values);
      reduce_scatter({room.data(), values.size, DType::F32}, counts);
      to_bf16(values, room);
      return;
    }
    const InCollective waiting(*this);
    sum_at_rank_0(values);
    const auto part = [&](int r) {
      const std::size_t element = size_of(values.dtype);
      return bytes_of(values).subspan(
          static_cast<std::size_t>(offset_of(counts, r)) * element,
          static_cast<std::size_t>(counts[static_cast<std::size_t>(r)]) * element);
    };
    if (rank() == 0) {
      for (int r = 1; r < size(); ++r) send(r, part(r));
    } else {
      receive(0, part(rank()));
    }
  }

  void all_gather(View values, std::span<const std::int64_t> counts) override {
    std::vector<std::int64_t> sizes(counts.begin(), counts.end());
    for (std::int64_t& n : sizes) n *= static_cast<std::int64_t>(size_of(values.dtype));
    gather_bytes(static_cast<std::byte*>(values.data), sizes);
  }

  void broadcast(View values, int root) override { broadcast_host(bytes_of(values), root); }

  void all_reduce_host(std::span<double> values, Reduce how) override {
    const InCollective waiting(*this);
    if (rank() == 0) {
      std::vector<double> more(values.size());
      for (int r = 1; r < size(); ++r) {
        receive(r, std::as_writable_bytes(std::span(more)));
        for (std::size_t i = 0; i < more.size(); ++i)
          values[i] = how == Reduce::Sum ? values[i] + more[i] : std::max(values[i], more[i]);
      }
    } else {
      send(0, std::as_bytes(values));
    }
    from_rank_0(std::as_writable_bytes(values));
  }

  void broadcast_host(std::span<std::byte> bytes, int root) override {
    const InCollective waiting(*this);
    if (root != 0 && rank() == root) send(0, bytes);
    if (root != 0 && rank() == 0) receive(root, bytes);
    from_rank_0(bytes);
  }

 private:
  void await_others(const Launch& launch, Clock::time_point end, double timeout) {
    const Listener listener =
        launch.listener >= 0 ? Listener{Descriptor(launch.listener), launch.port} : listen_at(launch.port);
    peers_.resize(static_cast<std::size_t>(size()));
    std::vector<Descriptor> strangers;
    const auto missing = [&] {
      std::vector<int> ranks;
      for (int r = 1; r < size(); ++r) {
        if (!peers_[static_cast<std::size_t>(r)]) ranks.push_back(r);
      }
      return ranks;
    };
    for (std::vector<int> ranks = missing(); !ranks.empty(); ranks = missing()) {
      if (Clock::now() > end) {
        throw RankError(fmt::format("{} {} of {} {} not come to {} within {:g} s.",
                                    ranks.size() == 1 ? "Rank" : "Ranks", fmt::join(ranks, ", "), size(),
                                    ranks.size() == 1 ? "has" : "have", address_, timeout),
                        "Their launcher's messages may say why; every host must reach that address.");
      }
      std::vector<pollfd> waiting{{listener.socket.get(), POLLIN, 0}};
      for (const Descriptor& s : strangers) waiting.push_back({s.get(), POLLIN, 0});
      if (::poll(waiting.data(), waiting.size(), static_cast<int>(kLook.count())) <= 0) continue;
      for (std::size_t i = 1; i < waiting.size(); ++i) {
        if (waiting[i].revents != 0) greet(std::move(strangers[i - 1]));
      }
      std::erase_if(strangers, [](const Descriptor& s) { return !s; });
      if (waiting[0].revents == 0) continue;
      if (Descriptor socket = accept_from(listener)) strangers.push_back(std::move(socket));
    }
  }

  // Keeps the connection of a rank of ours; any other one is closed.
  void greet(Descriptor socket) {
    Greeting said;
    const Greeting expected;
    if (::recv(socket.get(), &said, sizeof said, MSG_DONTWAIT) != sizeof said ||
        std::memcmp(said.name, expected.name, sizeof said.name) != 0 || said.size != size() ||
        said.rank < 1 || said.rank >= size() || peers_[static_cast<std::size_t>(said.rank)])
      return;
    make_prompt(socket);
    peers_[static_cast<std::size_t>(said.rank)] = std::move(socket);
  }

  void find_rank_0(const Launch& launch, Clock::time_point end, double timeout) {
    Greeting greeting;
    greeting.rank = rank();
    greeting.size = size();
    while (Clock::now() < end) {
      Descriptor socket = connect_to_host(launch.master, launch.port, milliseconds(5000));
      if (socket) {
        make_prompt(socket);
        peers_.push_back(std::move(socket));
        send(0, std::as_bytes(std::span(&greeting, 1)));
        return;
      }
      std::this_thread::sleep_for(kLook);
    }
    throw RankError(fmt::format("Rank {} of {} waited {:g} s for rank 0, which does not answer at {}.",
                                rank(), size(), timeout, address_),
                    launch.launcher == Launcher::Own
                        ? ""
                        : "MASTER_ADDR and MASTER_PORT say where rank 0 is; every host must reach it.");
  }

  // --- the pieces of every exchange
  void sum_at_rank_0(View values) {
    if (rank() > 0) {
      send(0, bytes_of(values));
      return;
    }
    std::vector<std::byte> more(bytes_of(values).size());
    for (int r = 1; r < size(); ++r) {
      receive(r, more);
      if (values.dtype == DType::F64) {
        add<double>(bytes_of(values), more);
      } else if (values.dtype == DType::F32) {
        add<float>(bytes_of(values), more);
      } else {
        throw InternalError(fmt::format("[all_reduce] of {}", name_of(values.dtype)));
      }
    }
  }

  void from_rank_0(std::span<std::byte> bytes) {
    if (rank() > 0) {
      receive(0, bytes);
      return;
    }
    for (int r = 1; r < size(); ++r) send(r, bytes);
  }

  void gather_bytes(std::byte* bytes, std::span<const std::int64_t> sizes) override {
    const InCollective waiting(*this);
    const auto part = [&](int r) {
      return std::span(bytes + offset_of(sizes, r),
                       static_cast<std::size_t>(sizes[static_cast<std::size_t>(r)]));
    };
    if (rank() == 0) {
      for (int r = 1; r < size(); ++r) receive(r, part(r));
    } else {
      send(0, part(rank()));
    }
    from_rank_0({bytes, static_cast<std::size_t>(offset_of(sizes, size()))});
  }

  const Descriptor& peer(int rank) const { return peers_[static_cast<std::size_t>(rank)]; }

  void send(int to, std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(peer(to).get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) {
        bytes = bytes.subspan(static_cast<std::size_t>(n));
      } else {
        wait_for(to, n, POLLOUT);
      }
    }
  }
  void receive(int from, std::span<std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::recv(peer(from).get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
      if (n > 0) {
        bytes = bytes.subspan(static_cast<std::size_t>(n));
      } else {
        wait_for(from, n, POLLIN);
      }
    }
  }
  void wait_for(int other, ssize_t result, short event) {
    if (result == 0) lose(fmt::format("rank {} closed its connection", other));
    if (errno == EINTR) return;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
      lose(fmt::format("the connection to rank {}: {}", other, std::strerror(errno)));
    check();
    pollfd waiting{peer(other).get(), event, 0};
    ::poll(&waiting, 1, static_cast<int>(kLook.count()));
  }

  std::string address_;
  std::vector<Descriptor> peers_;  // of rank 0 by rank, else rank 0 alone
};

}  // namespace

std::shared_ptr<Communicator> make_tcp_communicator(const Launch& launch, double timeout) {
  return std::make_shared<TcpCommunicator>(launch, timeout);
}

}  // namespace fathom
