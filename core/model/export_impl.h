/// export_impl.h - the parts of an export, for core/model/*.c only.
#pragma once
#include "core/model/export.h"

/// CQ_EUSAGE unless the model is a student with at least one quantized matrix.
int cq_export_quantized(cq_model *m);
/// The target may be new, empty, or an earlier export of the same kind; never the source.
int cq_export_check(cq_model *m, const char *dir, bool nvfp4);
/// Whether a folder is an earlier export of that kind.
bool cq_export_is_ours(const char *dir, bool nvfp4);
/// Everything but the weights, into an existing folder.
int cq_export_files(cq_model *m, const char *folder, bool nvfp4);
/// The input_scale of a quantized parameter; CQ_ENUMERIC when its maximum was not calibrated.
int cq_export_input_scale(float *scale, const cq_param *p);
