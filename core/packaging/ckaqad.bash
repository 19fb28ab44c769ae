# bash completion of ckaqad: recipes, commands, and the options a recipe's own --help lists
_ckaqad() {
  local cur=${COMP_WORDS[COMP_CWORD]} recipe=${COMP_WORDS[1]}
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W "verify --help --version -e" -- "$cur"; compgen -f -X '!*.lua' -- "$cur"; compgen -d -- "$cur")
  elif [[ $cur == --*=* ]]; then
    mapfile -t COMPREPLY < <(compgen -f -- "${cur#*=}")
  elif [[ $recipe == *.lua && -f $recipe ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$("${COMP_WORDS[0]}" "$recipe" --help 2>/dev/null | grep -o -- '--[a-z][a-z_-]*' | sort -u)" -- "$cur")
  elif [ "$recipe" = verify ]; then
    mapfile -t COMPREPLY < <(compgen -W "--against=" -- "$cur"; compgen -d -- "$cur")
  fi
}
complete -o nospace -o filenames -F _ckaqad ckaqad
