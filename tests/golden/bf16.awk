# Reports of check.lua in BF16: the first of a plain evaluation, the second of a device, whose errors are at most twice as large. The
# three that are one number each (KL, cross-entropy, a norm) are left out: how near rounding brings one number to the truth is luck.
FNR == NR { match($0, /worst [^ ]+/); cpu[FNR] = substr($0, RSTART + 6, RLENGTH - 6) + 0; lines = FNR; next }
!/ kl | cross-entropy  | norm / {
  match($0, /worst [^ ]+/); worst = substr($0, RSTART + 6, RLENGTH - 6) + 0
  ratio = cpu[FNR] > 0 ? worst / cpu[FNR] : worst > 0 ? 1e9 : 0
  if (ratio > most) most = ratio
}
END { printf "largest error %.2f times that of the plain evaluation in BF16\n", most; exit most > 2 || FNR != lines || lines < 3 }
