/// ckaqad.h - the whole public API: include this one.
#pragma once
#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/hash.h"
#include "core/base/process.h"
#include "core/base/rng.h"
#include "core/model/config.h"
#include "core/model/export.h"
#include "core/model/generate.h"
#include "core/model/model.h"
#include "core/model/quant_stats.h"
#include "core/quant/rules.h"
#include "core/quant/scales.h"
#include "core/tensor/device.h"
#include "core/tensor/plan.h"
#include "core/tensor/rate.h"
#include "core/tensor/safetensors.h"
#include "core/tensor/tensor.h"
#include "core/text/batch.h"
#include "core/text/chat.h"
#include "core/text/corpus.h"
#include "core/text/show.h"
#include "core/text/tokenizer.h"
#include "core/train/cache.h"
#include "core/train/checkpoint.h"
#include "core/train/distill.h"
#include "core/train/optimizer.h"
#include "kernels/kernels.h"

/// "0.1.0 (oneDNN 2.6.3, ...)": version of the library and of what it was built with; malloc-free
/// static text.
CQ_API const char *cq_version(void);
