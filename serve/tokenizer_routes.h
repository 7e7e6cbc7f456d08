// /tokenize, /detokenize and /tokenizer_info, as vLLM's clients ask them (lm-evaluation-harness among them).
#pragma once

#include "serve/http/exchange.h"
#include "serve/served_model.h"

namespace fathom::serve {

/// ApiError: what the body asks for cannot be done.
HttpReply tokenize(const HttpRequest& request, const ServedModel& model);
HttpReply detokenize(const HttpRequest& request, const ServedModel& model);
HttpReply tokenizer_info(const ServedModel& model);

}  // namespace fathom::serve
