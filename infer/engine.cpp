#include "infer/engine.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include <fmt/format.h>

#include "infer/speculate/chance.h"
#include "kernels/error.h"
#include "src/ops/routing.h"

namespace fathom {

const char* name_of(Finish finish) {
  switch (finish) {
    case Finish::None:
      return "";
    case Finish::Stop:
      return "stop";
    case Finish::Length:
      return "length";
    case Finish::Error:
      return "error";
  }
  return "";
}

Engine::Engine(Context& c, const Transformer& model, const EngineOptions& options)
    : c_(c), model_(model), options_(options), cache_(c, model, options.cache) {
  if (options.max_rows < 1 || options.max_sequences < 1)
    throw InternalError("[engine] a pass has at least one row of one sequence");
  if (options.prefix_cache) {
    prefixes_ = std::make_unique<PrefixCache>(cache_);
    cache_.reclaim_by([prefixes = prefixes_.get()] { return prefixes->forget_one(); });
  }
  const std::int64_t vocab = model.config().vocab_size;
  if (options_.vocab <= 0 || options_.vocab > vocab) options_.vocab = vocab;
  if (options.whole_rows != 0) {
    try {
      whole_ = WholeStep::open(
          c, model, options.rule, cache_, options_.vocab,
          std::min(options.whole_rows < 0 ? kMostWholeRows : options.whole_rows, options.max_sequences));
    } catch (const MemoryError&) {
      // The cache has taken it all: op by op is slower and needs nothing of its own.
    }
  }
  static_cast<PassCounts&>(stats_) = PassCounts(model);
}

RequestId Engine::submit(Request request) {
  check_request(request, options_.vocab, context(), cache_);
  Running r;
  r.id = next_++;
  r.ids = request.prompt;
  r.request = std::move(request);
  waiting_.push_back(std::move(r));
  return waiting_.back().id;
}

void Engine::release(Running& r) {
  if (cycles_ != nullptr) cycles_->leave(r.id);
  if (r.sequence >= 0) cache_.remove(r.sequence);
  r.sequence = -1;
  r.computed = r.adopted = r.remembered = 0;
  r.begun = r.had_cycles = r.went_ahead = false;
}

void Engine::cancel(RequestId id) {
  for (std::list<Running>* list : {&waiting_, &running_}) {
    const auto found = std::find_if(list->begin(), list->end(), [&](const Running& r) { return r.id == id; });
    if (found == list->end()) continue;
    release(*found);
    list->erase(found);
    if (cycles_ != nullptr) cycles_->end(id);
    return;
  }
}

void Engine::assume_computed(RequestId id, double kept) {
  const auto found =
      std::find_if(waiting_.begin(), waiting_.end(), [&](const Running& r) { return r.id == id; });
  if (found == waiting_.end()) throw InternalError("[engine] no such request waits");
  if (running_.empty()) cache_.fill_random(c_);
  Running& r = *found;
  const std::int64_t computed = static_cast<std::int64_t>(r.ids.size()) - 1;
  const SequenceId sequence = cache_.add();
  try {
    cache_.assume(sequence, computed,
                  static_cast<std::int64_t>(std::llround(kept * static_cast<double>(computed))));
  } catch (...) {
    cache_.remove(sequence);
    throw;
  }
  r.sequence = sequence;
  r.computed = computed;
  r.scored = computed + 1;
  r.is_assumed = true;
  running_.splice(running_.end(), waiting_, found);
}

// Groups that the running texts will still take: for all of the ids that they have, for a first chunk in the
// routed layers whatever they keep of it, and a group each to grow by.
std::int64_t Engine::promised_groups() const {
  std::int64_t groups = 0;
  for (const Running& r : running_) {
    const auto tokens = static_cast<std::int64_t>(r.ids.size());
    groups += 1 + cache_.missing_groups(r.sequence, tokens,
                                        r.begun ? 0 : std::min(tokens - r.computed, options_.max_rows));
  }
  return groups;
}

Event Engine::stop(RequestId id) {
  const auto found =
      std::find_if(running_.begin(), running_.end(), [&](const Running& r) { return r.id == id; });
  Event event;
  event.request = id;
  event.finish = Finish::Stop;
  if (found != running_.end() && found->computed > 0) finish(*found, event);
  cancel(id);
  return event;
}

// The first of those that wait, if there is room for it beside what the running texts will still take. How
// much the routed layers will keep is not known before it is computed, so a chunk counts as a whole and the
// rest not at all.
bool Engine::admit() {
  if (waiting_.empty() || static_cast<std::int64_t>(running_.size()) >= options_.max_sequences) return false;
  Running& r = waiting_.front();
  r.sequence = cache_.add();
  adopt(r);
  const auto tokens = static_cast<std::int64_t>(r.ids.size());
  const std::int64_t needed =
      cache_.missing_groups(r.sequence, tokens, std::min(tokens - r.computed, options_.max_rows));
  const auto has_room = [&] { return needed + promised_groups() <= cache_.pool().available_groups(); };
  if (!running_.empty() && !has_room() && !(cycles_ != nullptr && cycles_->give_up() && has_room())) {
    release(r);
    return false;
  }
  running_.splice(running_.end(), waiting_, waiting_.begin());
  return true;
}

std::vector<Engine::Part> Engine::schedule() {
  std::vector<Part> parts;
  std::int64_t rows = options_.max_rows;
  const auto take = [&](Running& r, std::int64_t n) {
    if (n <= 0) return;
    parts.push_back({&r, n});
    rows -= n;
  };
  // Others of the same beginning may have been before it since it was admitted.
  for (Running& r : running_) adopt(r);
  // Texts that wait for their next token first, then prompts in the order in which they came.
  for (Running& r : running_) {
    if (r.left() == 1 && r.computed > 0) take(r, std::min<std::int64_t>(1, rows));
  }
  for (Running& r : running_) {
    if (r.left() > 1 || r.computed == 0) take(r, std::min(r.left(), rows));
  }
  return parts;
}

void Engine::preempt(Running& victim) {
  if (victim.computed > 0) ++stats_.preemptions;
  release(victim);
  const auto at =
      std::find_if(running_.begin(), running_.end(), [&](const Running& r) { return &r == &victim; });
  // Before those that came later.
  const auto before =
      std::find_if(waiting_.begin(), waiting_.end(), [&](const Running& r) { return r.id > victim.id; });
  waiting_.splice(before, running_, at);
}

// Who came last gives its blocks back until the others' new rows fit. Nothing is lost: it is computed again.
void Engine::make_room(std::vector<Part>& parts, std::vector<Event>& events) {
  while (!parts.empty()) {
    std::vector<NewRows> rows;
    rows.reserve(parts.size());
    for (const Part& p : parts) rows.push_back({p.request->sequence, p.rows});
    if (cache_.fits(rows)) return;
    // What speculation holds while it rests is of use to nobody.
    if (cycles_ != nullptr && !few_are_written() && cycles_->give_up()) continue;
    if (prefixes_ && prefixes_->forget_one()) continue;
    if (cycles_ != nullptr && cycles_->give_up()) continue;
    // A chunk of a prompt may be smaller.
    const auto longest = std::max_element(parts.begin(), parts.end(),
                                          [](const Part& a, const Part& b) { return a.rows < b.rows; });
    // Before anybody is sent away that may go on, as long as it is worth a pass.
    constexpr std::int64_t kWorthAPass = 256;
    if (longest->rows > (running_.size() == 1 ? 1 : kWorthAPass)) {
      longest->rows = (longest->rows + 1) / 2;
      continue;
    }
    Running& victim = running_.back();
    std::erase_if(parts, [&](const Part& p) { return p.request == &victim; });
    if (running_.size() > 1) {
      preempt(victim);
      continue;
    }
    if (victim.adopted > 0 || victim.had_cycles || victim.went_ahead) {
      victim.recomputes = true;
      preempt(victim);
      continue;
    }
    Event event;
    event.request = victim.id;
    event.finish = Finish::Error;
    event.error = fmt::format("The cache ({} blocks of {}) holds no more than the {} tokens of this text.",
                              cache_.pool().blocks(), cache_.block(), victim.computed);
    events.push_back(event);
    release(victim);
    victim.finished = true;
  }
}

std::vector<Event> Engine::step() {
  std::vector<Event>& events = events_;
  while (admit()) {
  }
  finish_scored(events);
  std::vector<Part> parts = schedule();
  make_room(parts, events);
  // Texts that go by cycles, next tokens that the backend does in steps of their own, and what is one pass of
  // the model's ops.
  auto cycles = parts.end();
  if (few_are_written())
    cycles =
        std::stable_partition(parts.begin(), parts.end(), [&](const Part& p) { return !goes_by_cycles(p); });
  auto whole = std::stable_partition(parts.begin(), cycles, [&](const Part& p) { return !goes_whole(p); });
  if (cycles - whole > most_whole_rows()) whole = cycles;
  run({parts.begin(), whole}, events, &Engine::run_pass);
  for (std::span<const Part> steps(whole, cycles); !steps.empty();) {
    const auto n = std::min(steps.size(), static_cast<std::size_t>(whole_->most_rows()));
    run(steps.first(n), events, &Engine::run_whole);
    steps = steps.subspan(n);
  }
  run_cycles({cycles, parts.end()}, events);
  if (!parts.empty()) ++stats_.steps;
  stats_.most_bytes = std::max(stats_.most_bytes, cache_.used_bytes());
  drop_finished();
  return std::exchange(events_, {});
}

void Engine::run(std::span<const Part> parts, std::vector<Event>& events,
                 void (Engine::*how)(std::span<const Part>, std::vector<Event>&)) {
  if (parts.empty()) return;
  try {
    for (const Part& p : parts) begin(*p.request);
    (this->*how)(parts, events);
    for (const Part& p : parts) remember(*p.request);
  } catch (const MemoryError& e) {
    fail(parts, e.what(), events);
  } catch (const std::bad_alloc&) {
    fail(parts, "The machine has no memory left.", events);
  } catch (const DeviceError&) {
    give_away(parts);
    throw;
  } catch (const std::exception& e) {
    if (how != &Engine::run_cycle) {
      give_away(parts);
      throw;
    }
    fail(parts, e.what(), events);  // a pass of one text's own
  }
}

// The cache has rows that were not computed: nobody goes on from them.
void Engine::give_away(std::span<const Part> parts) {
  std::vector<Event> nobody;
  fail(parts, "", nobody);
  drop_finished();
}

void Engine::fail(std::span<const Part> parts, const std::string& error, std::vector<Event>& events) {
  for (const Part& p : parts) {
    if (p.request->finished) continue;
    Event event;
    event.request = p.request->id;
    event.finish = Finish::Error;
    event.error = error;
    events.push_back(std::move(event));
    p.request->finished = true;
  }
}

// Nothing follows from a single token that is scored only.
void Engine::finish_scored(std::vector<Event>& events) {
  for (Running& r : running_) {
    if (r.left() > 0) continue;
    Event event;
    event.request = r.id;
    event.finish = Finish::Length;
    r.finished = true;
    events.push_back(std::move(event));
  }
  drop_finished();
}

void Engine::tell_routing(Running& r, Event& event) const {
  if (!r.request.routing || r.computed <= r.told) return;
  for (auto& token : cache_.kept(r.sequence, r.told, r.computed)) event.kept.push_back(std::move(token));
  r.told = r.computed;
}

void Engine::finish(Running& r, Event& event) {
  tell_routing(r, event);
  r.finished = true;
  describe(r, event);
}

// The text as far as it is computed.
void Engine::describe(const Running& r, Event& event) const {
  event.cached_tokens = std::max<std::int64_t>(0, r.cached);
  event.verifications = r.verifications;
  event.verified_tokens = r.verified_tokens;
  for (const std::int64_t layer : model_.routed_layers())
    event.routed_fraction.push_back(static_cast<double>(cache_.entries_of(r.sequence, layer, r.computed)) /
                                    static_cast<double>(r.computed));
}

void Engine::drop_finished() {
  for (Running& r : running_) {
    if (!r.finished) continue;
    release(r);
    if (cycles_ != nullptr) cycles_->end(r.id);
  }
  running_.remove_if([](const Running& r) { return r.finished; });
}

// Thresholds by row only where they differ: each is a sum more in every routed layer.
Causal Engine::rule_of(std::span<const Part> parts) const {
  Causal rule = options_.rule;
  rule.threshold = threshold_of(*parts.front().request);
  const bool differ = std::any_of(parts.begin(), parts.end(),
                                  [&](const Part& p) { return threshold_of(*p.request) != rule.threshold; });
  if (!differ || model_.routing().kind == RoutingKind::None) return rule;
  std::vector<double> thresholds;
  for (const Part& p : parts)
    thresholds.insert(thresholds.end(), static_cast<std::size_t>(p.rows), threshold_of(*p.request));
  rule.shifts = row_shifts(c_, thresholds);
  return rule;
}

void Engine::run_pass(std::span<const Part> parts, std::vector<Event>& events) {
  const NoGrad no_grad(c_);
  HostBatch host;
  host.batch = 1;
  std::vector<NewRows> rows;
  std::vector<Wanted> wanted;
  for (const Part& p : parts) {
    const Running& r = *p.request;
    rows.push_back({r.sequence, p.rows});
    for (std::int64_t i = 0; i < p.rows; ++i) {
      const std::int64_t position = r.computed + i;
      const bool last = position + 1 == static_cast<std::int64_t>(r.ids.size());
      const bool scored = r.request.prompt_logprobs && position + 1 >= r.scored &&
                          position + 1 < static_cast<std::int64_t>(r.request.prompt.size());
      if (last || scored)
        wanted.push_back({&r,
                          static_cast<std::int32_t>(host.tokens.size()),
                          position + 1,
                          scored || !device_chooses(r),
                          {},
                          {}});
      host.tokens.push_back(r.ids[static_cast<std::size_t>(position)]);
      host.positions.push_back(static_cast<std::int32_t>(position));
      host.documents.push_back(0);
    }
  }
  host.seq = static_cast<std::int64_t>(host.tokens.size());
  Batch batch = upload(c_, host);
  batch.cache = &cache_;
  cache_.begin(c_, rows);
  const ForwardResult result = model_.forward(c_, batch, rule_of(parts));
  stats_.add(result, host.seq);

  const std::vector<float> logits = choose_or_read(result.hidden, wanted);
  auto next = wanted.begin();
  for (const Part& p : parts) {
    Running& r = *p.request;
    Event event;
    event.request = r.id;
    const auto prompt = static_cast<std::int64_t>(r.request.prompt.size());
    stats_.prompt_tokens += std::clamp<std::int64_t>(prompt - r.computed, 0, p.rows);
    for (; next != wanted.end() && next->request == &r; ++next) {
      if (event.finish != Finish::None) continue;
      if (next->needs_logits) {
        use_logits(r, next->position, next->logits, event);
      } else {
        take(r, {next->pick.token, NAN}, event);
      }
    }
    r.computed += p.rows;
    if (r.request.max_tokens == 0 && r.left() == 0 && event.finish == Finish::None)
      event.finish = Finish::Length;
    if (event.finish != Finish::None) finish(r, event);
    if (event.has_token) tell_routing(r, event);
    if (event.has_token || event.finish != Finish::None || !event.prompt_logprobs.empty())
      events.push_back(std::move(event));
  }
}

// The device chooses for the rows for which it can; the others' logits come to the host, those of the
// engine's own ids: the model's vocabulary is the store's, padded, and the rest means nothing. Returns what
// these lie in.
std::vector<float> Engine::choose_or_read(const Tensor& hidden, std::vector<Wanted>& wanted) {
  if (wanted.empty()) return {};
  const auto rows_at = [&](const std::vector<std::int32_t>& rows) {
    Tensor at = c_.empty({static_cast<std::int64_t>(rows.size())}, DType::I32);
    from_host(c_.backend(), at, rows);
    return at;
  };
  std::vector<std::int32_t> rows;
  rows.reserve(wanted.size());
  for (const Wanted& w : wanted) rows.push_back(w.row);
  const std::int64_t vocab = model_.config().vocab_size;
  const Tensor logits = model_.logits(c_, ops::gather_rows(c_, hidden, rows_at(rows)));

  std::vector<TokenPick> picks;
  for (const Wanted& w : wanted) {
    const Running& r = *w.request;
    picks.push_back({r.request.sampling.temperature,
                     uniform(r.request.sampling.seed, static_cast<std::uint64_t>(w.position))});
  }
  // Many rows that need their logits are a prompt that is scored: then all come, and nothing is chosen here.
  const auto needed = static_cast<std::size_t>(
      std::count_if(wanted.begin(), wanted.end(), [](const Wanted& w) { return w.needs_logits; }));
  const bool most = 2 * needed >= wanted.size();
  const bool chosen = !most && c_.backend().choose_tokens(picks, logits, vocab, options_.vocab);
  rows.clear();
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    Wanted& w = wanted[i];
    w.pick = picks[i];
    w.needs_logits = w.needs_logits || !chosen || !w.pick.finite;
    if (w.needs_logits) rows.push_back(static_cast<std::int32_t>(i));
  }
  if (rows.empty()) return {};
  const bool all = rows.size() == wanted.size();
  std::vector<float> values =
      to_floats(c_.backend(), all ? logits : ops::gather_rows(c_, logits, rows_at(rows)));
  for (std::size_t i = 0; i < rows.size(); ++i)
    wanted[static_cast<std::size_t>(rows[i])].logits = std::span(values).subspan(
        i * static_cast<std::size_t>(vocab), static_cast<std::size_t>(options_.vocab));
  return values;
}

// Logits for the id at `position`: one of the prompt is scored, a new one chosen.
void Engine::use_logits(Running& r, std::int64_t position, std::span<const float> logits, Event& event) {
  try {
    if (position < static_cast<std::int64_t>(r.ids.size())) {
      event.prompt_logprobs.push_back(logprob_of(logits, r.ids[static_cast<std::size_t>(position)],
                                                 static_cast<std::uint64_t>(position)));
      if (r.request.top_logprobs > 0)
        event.prompt_alternatives.push_back(most_likely(logits, r.request.top_logprobs));
      r.scored = position + 1;
    } else {
      choose(r, logits, event);
    }
  } catch (const UserError& e) {
    event.finish = Finish::Error;
    event.error = e.what();
  }
}

void Engine::choose(Running& r, std::span<const float> logits, Event& event) {
  const auto position = static_cast<std::int64_t>(r.ids.size());
  if (observer_) observer_(r.id, position, logits);
  const std::span<const std::int32_t> ids(r.ids);
  const std::size_t prompt = r.request.prompt.size();
  const SamplingOptions& sampling = r.request.sampling;
  const auto place = static_cast<std::uint64_t>(position);
  const TokenHistory history{ids.subspan(0, prompt), ids.subspan(prompt)};
  SampledToken next;
  if (options_.shared_noise && sampling.temperature > 0) {
    std::vector<double> p;
    probabilities(logits, sampling, place, history, p);
    next.id = gumbel_choice(p, sampling.seed, position);
    next.logprob = r.request.logprobs ? logprob_of(logits, next.id, place) : NAN;
  } else {
    next = sample(logits, sampling, place, history, r.request.logprobs);
  }
  take(r, next, event);
  if ((event.has_token || event.has_stop_token) && r.request.top_logprobs > 0)
    event.alternatives = most_likely(logits, r.request.top_logprobs);
}

void Engine::take(Running& r, const SampledToken& next, Event& event) {
  const std::vector<std::int32_t>& stops = r.request.stop_tokens;
  if (std::find(stops.begin(), stops.end(), next.id) != stops.end()) {
    event.finish = Finish::Stop;
    event.has_stop_token = true;
    event.token = next;
    return;
  }
  event.has_token = true;
  event.token = next;
  const auto position = static_cast<std::int64_t>(r.ids.size());
  r.ids.push_back(next.id);
  ++stats_.decoded_tokens;
  if (r.generated() >= r.request.max_tokens || position + 1 >= context()) event.finish = Finish::Length;
}

EngineStats Engine::stats() const {
  EngineStats s = stats_;
  s.waiting = static_cast<std::int64_t>(waiting_.size());
  s.running = static_cast<std::int64_t>(running_.size());
  s.blocks = cache_.pool().blocks();
  s.free_blocks = cache_.pool().available_blocks();
  s.prefix_blocks = cache_.pool().idle_blocks();
  s.block_bytes = cache_.bytes_per_block();
  if (cycles_ != nullptr) s.cycles = cycles_->stats();
  return s;
}

}  // namespace fathom
