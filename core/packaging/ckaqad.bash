# bash completion of ckaqad: the program itself says what fits (ckaqad complete)
_ckaqad() {
  local i n=0 typed=() word rest
  # bash splits words at "=" and ":"; here they are whole again
  for ((i = 1; i <= COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    if ((n > 0)) && [[ $word == [=:]* || ${typed[n - 1]} == *[=:] && ${COMP_WORDS[i - 1]} == *[=:] ]]; then
      typed[n - 1]+=$word
    else
      typed[n++]=$word
    fi
  done
  mapfile -t COMPREPLY < <("${COMP_WORDS[0]}" complete -- "${typed[@]}" 2>/dev/null)
  # bash puts the answer in the place of what follows the last separator only
  word=${typed[n - 1]} rest=
  [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && rest=${word%"${word##*=}"}
  [[ $COMP_WORDBREAKS == *:* && $word == *:* && ${#word} -gt ${#rest} ]] && rest=${word%"${word##*[=:]}"}
  for i in "${!COMPREPLY[@]}"; do
    word=${COMPREPLY[i]#"$rest"}
    case $word in */ | *= | *:) ;; *) word+=" " ;; esac
    COMPREPLY[i]=$word
  done
}
complete -o nospace -F _ckaqad ckaqad
