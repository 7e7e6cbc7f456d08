// Causal attention on the CPU: against a double reference that holds T x T, its own finite differences, and
// itself under everything that must not change a bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "tests/kernels/cpu_backends.h"

namespace fathom {
namespace {

using testing_support::backend_for;
using testing_support::expect_internal_error;
using testing_support::isas;
using testing_support::normal;
using testing_support::same_bits;
using testing_support::view;

using FirstKeys = std::vector<std::int32_t>;

ConstView view_or_null(const FirstKeys& first) { return first.empty() ? ConstView() : view(first); }

AttentionShape shape(std::int64_t batch, std::int64_t seq, std::int64_t heads, std::int64_t kv_heads,
                     std::int64_t head_dim) {
  return {batch, seq, heads, kv_heads, head_dim, 1.0 / std::sqrt(static_cast<double>(head_dim))};
}
std::int64_t row_size(const AttentionShape& s) { return (s.heads + 2 * s.kv_heads) * s.head_dim; }

template <typename T>
struct Result {
  std::vector<T> out;
  std::vector<T> lse;
};

template <typename T>
Result<T> forward(Backend& backend, const std::vector<T>& qkv, const FirstKeys& first,
                  const AttentionShape& s) {
  Result<T> r{std::vector<T>(s.batch * s.seq * s.heads * s.head_dim, T(NAN)),
              std::vector<T>(s.batch * s.seq * s.heads, T(NAN))};
  backend.attention_forward(view(r.out), view(r.lse), view(qkv), view_or_null(first), s);
  return r;
}

template <typename T>
std::vector<T> backward(Backend& backend, const std::vector<T>& qkv, const FirstKeys& first,
                        const std::vector<T>& dout, const AttentionShape& s) {
  const Result<T> r = forward(backend, qkv, first, s);
  std::vector<T> dqkv(qkv.size(), T(NAN));
  backend.attention_backward(view(dqkv), view(dout), view(r.out), view(r.lse), view(qkv), view_or_null(first),
                             s);
  return dqkv;
}

struct Reference {
  std::vector<double> out, lse, dqkv;
};

/// Softmax written out, with the textbook gradient.
template <typename T>
Reference reference(const std::vector<T>& qkv, const FirstKeys& first, const std::vector<T>& dout,
                    const AttentionShape& s) {
  const std::int64_t d = s.head_dim;
  const std::int64_t ld = row_size(s);
  Reference r{std::vector<double>(s.batch * s.seq * s.heads * d),
              std::vector<double>(s.batch * s.seq * s.heads), std::vector<double>(qkv.size())};
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t g = h / (s.heads / s.kv_heads);
      for (std::int64_t i = 0; i < s.seq; ++i) {
        const std::int64_t low = first.empty() ? 0 : first[b * s.seq + i];
        const std::int64_t q = (b * s.seq + i) * ld + h * d;
        const auto k = [&](std::int64_t j) { return (b * s.seq + j) * ld + (s.heads + g) * d; };
        const auto v = [&](std::int64_t j) { return k(j) + s.kv_heads * d; };
        std::vector<double> p(i + 1 - low);
        double peak = -INFINITY;
        for (std::int64_t j = low; j <= i; ++j) {
          for (std::int64_t e = 0; e < d; ++e) p[j - low] += double(qkv[q + e]) * double(qkv[k(j) + e]);
          p[j - low] *= s.scale;
          peak = std::max(peak, p[j - low]);
        }
        double sum = 0;
        for (double& x : p) sum += x = std::exp(x - peak);
        r.lse[(b * s.heads + h) * s.seq + i] = peak + std::log(sum);
        const std::int64_t o = ((b * s.seq + i) * s.heads + h) * d;
        std::vector<double> dp(p.size());
        double delta = 0;
        for (std::int64_t j = low; j <= i; ++j) {
          p[j - low] /= sum;
          for (std::int64_t e = 0; e < d; ++e) {
            r.out[o + e] += p[j - low] * double(qkv[v(j) + e]);
            dp[j - low] += double(dout[o + e]) * double(qkv[v(j) + e]);
            r.dqkv[v(j) + e] += p[j - low] * double(dout[o + e]);
          }
          delta += p[j - low] * dp[j - low];
        }
        for (std::int64_t j = low; j <= i; ++j) {
          const double ds = p[j - low] * (dp[j - low] - delta) * s.scale;
          for (std::int64_t e = 0; e < d; ++e) {
            r.dqkv[q + e] += ds * double(qkv[k(j) + e]);
            r.dqkv[k(j) + e] += ds * double(qkv[q + e]);
          }
        }
      }
    }
  }
  return r;
}

template <typename T>
void expect_close(const std::vector<T>& got, const std::vector<double>& want, const char* what) {
  const double bound = sizeof(T) == 4 ? 2e-5 : 4e-14;
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], bound * (1 + std::abs(want[i]))) << what << " element " << i;
  }
}

/// Documents of these lengths, one after the other, filling each sequence.
FirstKeys documents(const AttentionShape& s, const std::vector<std::int64_t>& lengths) {
  FirstKeys first;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    std::int64_t at = 0;
    for (const std::int64_t n : lengths) {
      first.insert(first.end(), n, static_cast<std::int32_t>(at));
      at += n;
    }
    EXPECT_EQ(at, s.seq);
  }
  return first;
}

struct Case {
  AttentionShape s;
  FirstKeys first;
  const char* name;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& [b, t, h, g, d] : std::vector<std::tuple<int, int, int, int, int>>{{1, 1, 1, 1, 8},
                                                                                      {2, 2, 2, 1, 20},
                                                                                      {3, 7, 4, 2, 16},
                                                                                      {8, 32, 4, 4, 64},
                                                                                      {1, 63, 2, 2, 24},
                                                                                      {1, 64, 6, 2, 32},
                                                                                      {1, 65, 3, 3, 18},
                                                                                      {2, 100, 4, 1, 40},
                                                                                      {1, 130, 2, 1, 64},
                                                                                      {1, 200, 1, 1, 128},
                                                                                      {1, 257, 2, 2, 80},
                                                                                      {1, 70, 2, 1, 256},
                                                                                      {1, 129, 3, 1, 2}}) {
    all.push_back({shape(b, t, h, g, d), {}, "causal"});
  }
  const AttentionShape s = shape(2, 150, 4, 2, 24);
  all.push_back({s, documents(s, {1, 40, 64, 3, 42}), "documents"});
  all.push_back({s, documents(s, {150}), "one document"});
  all.push_back({s, documents(s, std::vector<std::int64_t>(150, 1)), "documents of one token"});
  FirstKeys window;
  for (std::int64_t i = 0; i < 300; ++i)
    window.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(0, i % 150 - 33)));
  all.push_back({s, window, "sliding window"});
  FirstKeys steps;
  for (std::int64_t i = 0; i < 300; ++i) steps.push_back(static_cast<std::int32_t>(i % 150 / 70 * 35));
  all.push_back({s, steps, "keys older than the run of queries"});
  return all;
}

template <typename T>
class Attention : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Attention, Types);

TYPED_TEST(Attention, MatchesADoubleReferenceAndIsTheSameOnAnyThreads) {
  using T = TypeParam;
  for (const Case& c : cases()) {
    const AttentionShape& s = c.s;
    const auto qkv = normal<T>(s.batch * s.seq * row_size(s), 1);
    const auto dout = normal<T>(s.batch * s.seq * s.heads * s.head_dim, 2);
    const Reference want = reference(qkv, c.first, dout, s);
    for (const std::string& isa : isas()) {
      SCOPED_TRACE(fmt::format("{} {}: B {} T {} H {} G {} d {}", isa, c.name, s.batch, s.seq, s.heads,
                               s.kv_heads, s.head_dim));
      const auto one = backend_for(isa, 1, false);
      const Result<T> r = forward(*one, qkv, c.first, s);
      expect_close(r.out, want.out, "out");
      expect_close(r.lse, want.lse, "lse");
      const std::vector<T> dqkv = backward(*one, qkv, c.first, dout, s);
      expect_close(dqkv, want.dqkv, "dqkv");
      for (const int threads : {2, 5}) {
        const auto many = backend_for(isa, threads, false);
        const Result<T> again = forward(*many, qkv, c.first, s);
        EXPECT_TRUE(same_bits(again.out.data(), r.out.data(), r.out.size())) << threads;
        EXPECT_TRUE(same_bits(again.lse.data(), r.lse.data(), r.lse.size())) << threads;
        const std::vector<T> dqkv_again = backward(*many, qkv, c.first, dout, s);
        EXPECT_TRUE(same_bits(dqkv_again.data(), dqkv.data(), dqkv.size())) << threads;
      }
    }
  }
}

TEST(AttentionGradient, MatchesFiniteDifferences) {
  const AttentionShape s = shape(1, 21, 4, 2, 6);
  const FirstKeys first = documents(s, {8, 1, 12});
  auto qkv = normal<double>(s.seq * row_size(s), 3);
  const auto dout = normal<double>(s.seq * s.heads * s.head_dim, 4);
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, false);
    const auto dqkv = backward(*backend, qkv, first, dout, s);
    const auto loss = [&] {
      const auto r = forward(*backend, qkv, first, s);
      return std::inner_product(r.out.begin(), r.out.end(), dout.begin(), 0.0);
    };
    for (std::size_t i = 0; i < qkv.size(); i += 3) {
      const double x = qkv[i];
      const double step = 1e-5;
      qkv[i] = x + step;
      const double above = loss();
      qkv[i] = x - step;
      const double below = loss();
      qkv[i] = x;
      ASSERT_NEAR(dqkv[i], (above - below) / (2 * step), 1e-7) << isa << " element " << i;
    }
  }
}

TYPED_TEST(Attention, PackedSequencesEqualSeparateRunsInBits) {
  using T = TypeParam;
  const std::vector<std::int64_t> lengths{5, 70, 1, 128, 16, 33};
  const AttentionShape all = shape(1, 253, 4, 2, 20);
  const FirstKeys first = documents(all, lengths);
  const auto qkv = normal<T>(all.seq * row_size(all), 5);
  const auto dout = normal<T>(all.seq * all.heads * all.head_dim, 6);
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, true);
    const Result<T> packed = forward(*backend, qkv, first, all);
    const std::vector<T> dpacked = backward(*backend, qkv, first, dout, all);
    std::int64_t at = 0;
    for (const std::int64_t n : lengths) {
      SCOPED_TRACE(fmt::format("{}: rows {} .. {}", isa, at, at + n));
      AttentionShape s = all;
      s.seq = n;
      const auto part = [](const std::vector<T>& v, std::int64_t begin, std::int64_t end) {
        return std::vector<T>(v.begin() + begin, v.begin() + end);
      };
      const std::int64_t wide = row_size(s);
      const std::int64_t narrow = s.heads * s.head_dim;
      const auto alone = part(qkv, at * wide, (at + n) * wide);
      const Result<T> r = forward(*backend, alone, {}, s);
      EXPECT_TRUE(same_bits(r.out.data(), packed.out.data() + at * narrow, r.out.size()));
      for (std::int64_t h = 0; h < s.heads; ++h) {
        EXPECT_TRUE(same_bits(r.lse.data() + h * n, packed.lse.data() + h * all.seq + at, n));
      }
      const auto d = backward(*backend, alone, {}, part(dout, at * narrow, (at + n) * narrow), s);
      EXPECT_TRUE(same_bits(d.data(), dpacked.data() + at * wide, d.size()));
      at += n;
    }
  }
}

TYPED_TEST(Attention, FutureRowsDoNotTouchEarlierOnes) {
  using T = TypeParam;
  const AttentionShape s = shape(1, 150, 2, 1, 24);
  const auto qkv = normal<T>(s.seq * row_size(s), 7);
  const std::int64_t narrow = s.heads * s.head_dim;
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, true);
    const Result<T> whole = forward(*backend, qkv, {}, s);
    for (const std::int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 100, 149}) {
      SCOPED_TRACE(fmt::format("{}: {} rows of {}", isa, n, s.seq));
      AttentionShape prefix = s;
      prefix.seq = n;
      const Result<T> r =
          forward(*backend, std::vector<T>(qkv.begin(), qkv.begin() + n * row_size(s)), {}, prefix);
      EXPECT_TRUE(same_bits(r.out.data(), whole.out.data(), n * narrow));
      for (const T poison : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(), T(3)}) {
        auto changed = qkv;
        std::fill(changed.begin() + n * row_size(s), changed.end(), poison);
        const Result<T> c = forward(*backend, changed, {}, s);
        EXPECT_TRUE(same_bits(c.out.data(), whole.out.data(), n * narrow)) << poison;
        for (std::int64_t h = 0; h < s.heads; ++h) {
          EXPECT_TRUE(same_bits(c.lse.data() + h * s.seq, whole.lse.data() + h * s.seq, n)) << poison;
        }
        EXPECT_FALSE(same_bits(c.out.data() + n * narrow, whole.out.data() + n * narrow, narrow));
      }
    }
  }
}

TYPED_TEST(Attention, AFutureNanDoesNotReachTheGradientOfEarlierQueries) {
  using T = TypeParam;
  const AttentionShape s = shape(1, 70, 1, 1, 16);
  const std::int64_t poisoned = 41;
  auto qkv = normal<T>(s.seq * row_size(s), 8);
  const auto dout = normal<T>(s.seq * s.head_dim, 9);
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 1, false);
    const auto clean = backward(*backend, qkv, {}, dout, s);
    auto changed = qkv;
    for (std::int64_t e = s.head_dim; e < 3 * s.head_dim; ++e) changed[poisoned * row_size(s) + e] = T(NAN);
    const auto dirty = backward(*backend, changed, {}, dout, s);
    for (std::int64_t i = 0; i < poisoned; ++i) {
      EXPECT_TRUE(same_bits(dirty.data() + i * row_size(s), clean.data() + i * row_size(s), s.head_dim)) << i;
    }
    EXPECT_TRUE(std::isnan(dirty[poisoned * row_size(s)]));
  }
}

TYPED_TEST(Attention, PlaceInTheBatchAndNumberOfHeadsDoNotMatter) {
  using T = TypeParam;
  const AttentionShape s = shape(3, 90, 2, 2, 12);
  const auto qkv = normal<T>(s.batch * s.seq * row_size(s), 10);
  const std::int64_t narrow = s.heads * s.head_dim;
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, true);
    const Result<T> whole = forward(*backend, qkv, {}, s);
    const Result<T> masked = forward(*backend, qkv, FirstKeys(s.batch * s.seq, 0), s);
    EXPECT_TRUE(same_bits(whole.out.data(), masked.out.data(), whole.out.size())) << isa;
    for (std::int64_t b = 0; b < s.batch; ++b) {
      AttentionShape alone = s;
      alone.batch = 1;
      const auto begin = qkv.begin() + b * s.seq * row_size(s);
      const Result<T> r = forward(*backend, std::vector<T>(begin, begin + s.seq * row_size(s)), {}, alone);
      EXPECT_TRUE(same_bits(r.out.data(), whole.out.data() + b * s.seq * narrow, r.out.size()))
          << isa << " " << b;
    }
  }
}

TYPED_TEST(Attention, LargeScoresStayFinite) {
  using T = TypeParam;
  const AttentionShape s = shape(1, 130, 1, 1, 8);
  auto qkv = normal<T>(s.seq * row_size(s), 11);
  for (std::int64_t i = 0; i < s.seq; ++i) {
    for (std::int64_t e = 0; e < 2 * s.head_dim; ++e) qkv[i * row_size(s) + e] *= T(60);
  }
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 1, false);
    const Result<T> r = forward(*backend, qkv, {}, s);
    for (const T x : r.out) ASSERT_TRUE(std::isfinite(x)) << isa;
    const auto d = backward(*backend, qkv, {}, normal<T>(s.seq * s.head_dim, 12), s);
    for (const T x : d) ASSERT_TRUE(std::isfinite(x)) << isa;
  }
}

TEST(AttentionCalls, LogTheVisiblePairsOfDocuments) {
  const AttentionShape s = shape(1, 4096, 1, 1, 8);
  const FirstKeys first = documents(s, std::vector<std::int64_t>(256, 16));
  const auto backend = backend_for(isas().back(), 2, false);
  backend->flop_log.enabled = true;
  const auto qkv = normal<float>(s.seq * row_size(s), 13);
  const auto r = forward(*backend, qkv, first, s);
  EXPECT_EQ(r.out.size(), 4096U * 8U);
  EXPECT_DOUBLE_EQ(backend->flop_log.items().at("attention_scores"), 4.0 * 8 * 256 * 16 * 16 / 2);
}

TEST(AttentionCalls, LogHalfTheSquare) {
  const AttentionShape s = shape(2, 50, 4, 2, 8);
  const auto backend = backend_for("portable", 1, false);
  backend->flop_log.enabled = true;
  const auto qkv = normal<float>(s.batch * s.seq * row_size(s), 14);
  const auto dout = normal<float>(s.batch * s.seq * s.heads * s.head_dim, 15);
  backward(*backend, qkv, {}, dout, s);
  EXPECT_DOUBLE_EQ(backend->flop_log.items().at("attention_scores"), 3 * 4.0 * 2 * 4 * 8 * 50 * 50 / 2);
}

TEST(AttentionCalls, EmptyBatchIsNothing) {
  const auto backend = backend_for("portable", 2, false);
  const AttentionShape s = shape(0, 8, 2, 1, 8);
  EXPECT_TRUE(backward<float>(*backend, {}, {}, {}, s).empty());
}

TEST(AttentionCalls, WrongSizesNameTheOpAndTheView) {
  const auto backend = backend_for("portable", 1, false);
  const AttentionShape s = shape(1, 4, 2, 1, 8);
  std::vector<float> qkv(4 * 32), out(4 * 16), lse(8), wrong(3);
  std::vector<double> other(8);
  const auto call = [&](View o, View l, ConstView q, ConstView f) {
    return [=, &backend] { backend->attention_forward(o, l, q, f, s); };
  };
  expect_internal_error(call(view(wrong), view(lse), view(qkv), {}), {"attention_forward", "out", "3", "64"});
  expect_internal_error(call(view(out), view(wrong), view(qkv), {}), {"attention_forward", "lse", "3", "8"});
  expect_internal_error(call(view(out), view(lse), view(wrong), {}),
                        {"attention_forward", "qkv", "3", "128"});
  expect_internal_error(call(view(out), view(other), view(qkv), {}), {"attention_forward", "fp64"});
  expect_internal_error(call(view(out), {nullptr, 8, DType::F32}, view(qkv), {}),
                        {"attention_forward", "lse", "null"});
  FirstKeys short_keys(3), future{0, 0, 3, 0}, falling{0, 1, 0, 0};
  expect_internal_error(call(view(out), view(lse), view(qkv), view(short_keys)),
                        {"attention_forward", "first_key"});
  expect_internal_error(call(view(out), view(lse), view(qkv), view(future)),
                        {"attention_forward", "first_key", "3"});
  expect_internal_error(call(view(out), view(lse), view(qkv), view(falling)), {"first_key", "decreases"});
  expect_internal_error(
      [&] { backend->attention_backward(view(wrong), view(out), view(out), view(lse), view(qkv), {}, s); },
      {"attention_backward", "dqkv"});
  AttentionShape ragged = s;
  ragged.heads = 3;
  ragged.kv_heads = 2;
  expect_internal_error([&] { backend->attention_forward(view(out), view(lse), view(qkv), {}, ragged); },
                        {"attention_forward", "kv_heads"});
}

TEST(FirstKeysOp, IsTheStartOfTheDocument) {
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, false);
    const std::vector<std::int32_t> documents{3, 3, 4, 4, 4, 9, /* next sequence */ 9, 10, 10, 10, 12, 12};
    std::vector<std::int32_t> first(12, -1);
    backend->first_keys(view(first), view(documents), 2, 6);
    EXPECT_EQ(first, (std::vector<std::int32_t>{0, 0, 2, 2, 2, 5, 0, 1, 1, 1, 4, 4})) << isa;
    std::vector<std::int32_t> wrong(11);
    expect_internal_error([&] { backend->first_keys(view(wrong), view(documents), 2, 6); },
                          {"first_keys", "first_key", "11", "12"});
  }
}

}  // namespace
}  // namespace fathom
