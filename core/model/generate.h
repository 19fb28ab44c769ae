/// generate.h - sequences continued token by token, many at once, over kept keys, values and
/// states.
///
/// Life of a generator: open - plan (with or after the model's own) - commit - begin - add prompts
/// - run, or step by step - results. A pass is one forward: a token of every sequence that is alive
/// and pieces of the prompts that wait, packed like documents. A sequence that ends leaves its slot
/// to the next prompt. With the `cpu` kernels in FP32 what a sequence becomes is a function of
/// model, plan, prompt, options and its number alone, bit for bit: not of the sequences beside it.
#pragma once
#include "core/model/model.h"

typedef struct cq_generator cq_generator;

/// How tokens are chosen.
typedef struct cq_generate_options {
    int64_t max_tokens;  ///< most tokens a sequence gets
    double temperature;  ///< logits are divided by it; 0: always the largest, ties to the lowest id
    double top_p;        ///< only the likeliest tokens that hold this probability together; (0, 1]
    const int32_t *stop; ///< [n_stop] ids that end a sequence; copied
    int64_t n_stop;
    uint64_t seed; ///< draws are a function of it, the sequence's number and the token's place
} cq_generate_options;

/// What one sequence has become; pointers are good until begin or close.
typedef struct cq_generated {
    const int32_t *ids;   ///< [n] what was added to the prompt, the stop token included
    const float *logprob; ///< [n] log-probability of each under the model's plain softmax
    int64_t n;
    bool ended;   ///< nothing more comes
    bool stopped; ///< by a stop token, not by max_tokens
} cq_generated;

/// The logits of the last pass.
typedef struct cq_generate_rows {
    int64_t n;
    const int64_t *sequence; ///< [n] whose
    const int64_t *place;    ///< [n] tokens before the one that these logits are about
    const cq_tensor *logits; ///< [slots, vocab], of the model's dtype; the first n rows
} cq_generate_rows;

/// For up to `slots` sequences at once, each of up to `room` tokens, prompt included. CQ_EUSAGE
/// where the model has fewer positions.
CQ_API int cq_generator_open(cq_generator **out, cq_model *m, int64_t slots, int64_t room);
CQ_API void cq_generator_close(cq_generator *g);
/// Declares keys, values, states and logits in a plan, after the model's cq_model_plan_work, which
/// bounds a pass: half its tokens, at most its longest document, are a piece of a prompt, and the
/// rest is for the slots (CQ_EUSAGE for more slots than that).
CQ_API int cq_generator_plan(cq_generator *g, cq_plan *p);
/// Forgets all sequences. CQ_EUSAGE names an option out of range.
CQ_API int cq_generator_begin(cq_generator *g, const cq_generate_options *o);
/// Adds `samples` sequences that begin with prompt [n]; they are numbered from 0 in the order of
/// adding. given [n_given] (0: none) are the first tokens of the answers, taken instead of drawn
/// ones: with all of an answer given, its log-probabilities come out. CQ_EDATA for an id outside
/// the vocabulary, CQ_EUSAGE for a prompt without tokens or without room.
CQ_API int cq_generator_add(cq_generator *g, const int32_t *prompt, int64_t n, const int32_t *given,
                            int64_t n_given, int64_t samples);
/// One pass; *left is the number of sequences that have not ended. After an error: begin again.
/// Leaves gradients and parameters alone, and no activations that a backward could use.
CQ_API int cq_generator_step(cq_generator *g, cq_stream *s, int64_t *left);
/// Passes until all have ended.
CQ_API int cq_generator_run(cq_generator *g, cq_stream *s);
CQ_API int64_t cq_generator_count(const cq_generator *g);
CQ_API int cq_generator_result(const cq_generator *g, int64_t sequence, cq_generated *out);
CQ_API void cq_generator_rows(const cq_generator *g, cq_generate_rows *out);
/// Passes and processed tokens since begin.
CQ_API void cq_generator_work(const cq_generator *g, int64_t *passes, int64_t *tokens);
