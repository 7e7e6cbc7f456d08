#include "kernels/shares.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include <fmt/format.h>

#include "kernels/cpu/host.h"
#include "kernels/error.h"

namespace fathom {

namespace {

/// A loop over rows, on all threads.
template <typename Body>
void for_rows(std::int64_t rows, Body&& body) {
  using B = std::remove_reference_t<Body>;
  cpu::run_pieces(
      rows, 1,
      [](void* b, std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) (*static_cast<B*>(b))(row);
      },
      &body);
}

/// What is not finite is no token's, and -infinity is a token that cannot come.
template <typename T>
void make_row(double* shares, const T* logits, std::int64_t choices, double temperature) {
  bool bad = false;
  double most = -INFINITY;
  for (std::int64_t id = 0; id < choices; ++id) {
    const auto z = static_cast<double>(logits[id]);
    bad |= !(z < INFINITY);
    most = std::max(most, z);
  }
  if (bad || !(most > -INFINITY)) {
    std::fill_n(shares, choices, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  double total = 0;
  for (std::int64_t id = 0; id < choices; ++id)
    total += shares[id] = std::exp((static_cast<double>(logits[id]) - most) / temperature);
  for (std::int64_t id = 0; id < choices; ++id) shares[id] /= total;
}

/// What a token is drawn by.
struct Weights {
  const double* p;
  const double* q;  // null: none
  std::int32_t certain;

  double operator()(std::int64_t id) const {
    if (id == certain) return 0;
    return q == nullptr ? p[id] : std::max(0.0, p[id] - q[id]);
  }
  double total(std::int64_t choices) const {
    double sum = 0;
    for (std::int64_t id = 0; id < choices; ++id) sum += (*this)(id);
    return sum;
  }
};

std::int32_t draw(Weights weights, std::int64_t choices, double uniform) {
  double total = weights.total(choices);
  if (!(total > 0)) {
    weights = {weights.p, nullptr, -1};
    total = weights.total(choices);
  }
  double left = uniform * total;
  std::int64_t last = 0;  // rounding may leave a little at the end: then it is the last one that can come
  for (std::int64_t id = 0; id < choices; ++id) {
    const double weight = weights(id);
    if (weight <= 0) continue;
    last = id;
    if (left < weight) break;
    left -= weight;
  }
  return static_cast<std::int32_t>(last);
}

void answer(ShareQuestion& q, std::int64_t choices) {
  const auto* p = static_cast<const double*>(q.p.data);
  q.finite = !std::isnan(p[0]);
  q.share = 0;
  q.token = -1;
  if (!q.finite) return;
  if (q.uniform >= 0)
    q.token = draw({p, static_cast<const double*>(q.q.data), q.certain}, choices, q.uniform);
  const std::int32_t id = q.id >= 0 ? q.id : q.token;
  if (id >= 0) q.share = p[id];
}

template <typename T>
void make_rows(double* shares, ConstView logits, std::int64_t rows, std::int64_t vocab, std::int64_t choices,
               double temperature) {
  const T* from = static_cast<const T*>(logits.data);
  for_rows(rows, [&](std::int64_t row) {
    make_row(shares + row * choices, from + row * vocab, choices, temperature);
  });
}

void require(bool holds, const char* op, const char* what) {
  if (!holds) throw InternalError(fmt::format("[{}] {}", op, what));
}

}  // namespace

void check_questions(std::span<const ShareQuestion> questions, std::int64_t choices) {
  const char* op = "ask_shares";
  require(choices > 0, op, "choices: none");
  const auto is_row = [&](const ConstView& v) {
    return v.data != nullptr && v.size == choices && v.dtype == DType::F64;
  };
  for (const ShareQuestion& q : questions) {
    require(is_row(q.p), op, "p is no row of shares");
    require(!q.q || is_row(q.q), op, "q is no row of shares");
    require(!q.q || q.certain < 0, op, "q and an id that all of it is");
    require(q.id < choices && q.certain < choices, op, "an id that is none of the choices");
    require(q.uniform < 1, op, "uniform is 1 or more");
  }
}

void make_shares_on_host(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab,
                         std::int64_t choices, double temperature) {
  const char* op = "make_shares";
  require(choices > 0 && choices <= vocab, op, "choices are none or more than the vocabulary");
  require(temperature > 0 && std::isfinite(temperature), op, "temperature is not a number above 0");
  require(shares.size == rows * choices && shares.dtype == DType::F64, op, "shares: another size or type");
  require(logits.size == rows * vocab, op, "logits: another size");
  auto* to = static_cast<double*>(shares.data);
  if (logits.dtype == DType::F32) {
    make_rows<float>(to, logits, rows, vocab, choices, temperature);
  } else if (logits.dtype == DType::F64) {
    make_rows<double>(to, logits, rows, vocab, choices, temperature);
  } else {
    cpu::fail_dtype(op, logits.dtype);
  }
}

void ask_shares_on_host(std::span<ShareQuestion> questions, std::int64_t choices) {
  check_questions(questions, choices);
  for_rows(std::ssize(questions),
           [&](std::int64_t i) { answer(questions[static_cast<std::size_t>(i)], choices); });
}

}  // namespace fathom
