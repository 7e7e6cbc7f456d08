#include "serve/tokenizer_routes.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "serve/answer.h"
#include "serve/api_error.h"
#include "serve/json_fields.h"
#include "src/io/utf8.h"

namespace fathom::serve {

namespace {

using nlohmann::json;

struct ControlToken {
  const char* name;
  std::int32_t id;
  std::string text;
};

// What ends a document, which is also what a text follows; and what begins one, where the tokenizer puts that
// before every text.
std::vector<ControlToken> control_tokens(const Tokenizer& tokenizer) {
  std::vector<ControlToken> all;
  const auto add = [&](const char* name, std::int32_t id) {
    if (id >= 0) all.push_back({name, id, tokenizer.piece(id)});
  };
  add("eos_token", tokenizer.end_of_document());
  add("bos_token", tokenizer.starts_with_bos() ? tokenizer.bos() : -1);
  return all;
}

// Harnesses ask for the tokens of documents that are longer than the context, to take windows of them.
constexpr std::size_t kMostBytes = 1'000'000;

void check_size(const std::string& text, const ServedModel& model) {
  if (text.size() > kMostBytes) check_length("prompt", text, model);
}

}  // namespace

HttpReply tokenizer_info(const ServedModel& model) {
  json out = {{"kind", model.tokenizer->kind()},
              {"vocab_size", model.limits.vocab},
              {"model_max_length", model.limits.context},
              {"eos_token", nullptr},
              {"bos_token", nullptr}};
  for (const ControlToken& token : control_tokens(*model.tokenizer)) {
    out[token.name] = token.text;
    out[std::string(token.name) + "_id"] = token.id;
  }
  return json_reply(out);
}

HttpReply tokenize(const HttpRequest& request, const ServedModel& model) {
  JsonFields fields(request.body);
  check_model(fields.text("model").value_or(""), model);
  const auto text = fields.text("prompt");
  const bool special = fields.flag("add_special_tokens", true);
  fields.refuse_others();
  if (!text) throw bad_field("prompt", "'prompt' is missing: the text.", "missing_required_parameter");
  check_size(*text, model);
  std::vector<std::int32_t> ids = model.tokenizer->encode(*text);
  // Its own name alone is a control token: clients learn its id so.
  for (const ControlToken& token : control_tokens(*model.tokenizer)) {
    if (!special && *text == token.text) ids = {token.id};
  }
  if (special && model.tokenizer->starts_with_bos()) ids.insert(ids.begin(), model.tokenizer->bos());
  return json_reply({{"tokens", ids}, {"count", ids.size()}, {"max_model_len", model.limits.context}});
}

HttpReply detokenize(const HttpRequest& request, const ServedModel& model) {
  JsonFields fields(request.body);
  check_model(fields.text("model").value_or(""), model);
  const json* tokens = fields.find("tokens");
  fields.refuse_others();
  if (tokens == nullptr || !tokens->is_array())
    throw bad_field("tokens", "'tokens' is missing, or no array of token ids.", "missing_required_parameter");
  std::vector<std::int32_t> ids;
  for (const json& id : *tokens) {
    const bool fits =
        id.is_number_integer() && (!id.is_number_unsigned() || id.get<std::uint64_t>() < 1U << 31);
    if (!fits || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() >= model.limits.vocab)
      throw bad_field("tokens",
                      fmt::format("'tokens' holds {}: expected ids below {}.", id.dump().substr(0, 32),
                                  model.limits.vocab),
                      "invalid_value");
    ids.push_back(id.get<std::int32_t>());
  }
  return json_reply({{"prompt", replace_invalid_utf8(model.tokenizer->decode(ids))}});
}

}  // namespace fathom::serve
