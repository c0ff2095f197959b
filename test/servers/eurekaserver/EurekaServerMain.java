package regbridge;

import org.springframework.boot.SpringApplication;
import org.springframework.boot.SpringBootConfiguration;
import org.springframework.boot.autoconfigure.EnableAutoConfiguration;
import org.springframework.cloud.netflix.eureka.server.EnableEurekaServer;
import org.springframework.context.annotation.Bean;
import org.springframework.core.env.Environment;
import org.springframework.security.config.Customizer;
import org.springframework.security.config.annotation.web.builders.HttpSecurity;
import org.springframework.security.config.annotation.web.configurers.AbstractHttpConfigurer;
import org.springframework.security.web.SecurityFilterChain;

/** A Eureka server that asks for a login if spring.security.user.password is set. */
@SpringBootConfiguration
@EnableAutoConfiguration
@EnableEurekaServer
public class EurekaServerMain {
    public static void main(String[] args) {
        SpringApplication.run(EurekaServerMain.class, args);
    }

    @Bean
    SecurityFilterChain security(HttpSecurity http, Environment properties) throws Exception {
        boolean login = properties.containsProperty("spring.security.user.password");
        http.csrf(AbstractHttpConfigurer::disable); // Eureka's clients know of no tokens
        http.authorizeHttpRequests(requests -> {
            if (login) {
                requests.anyRequest().authenticated();
            } else {
                requests.anyRequest().permitAll();
            }
        });
        if (login) {
            http.httpBasic(Customizer.withDefaults());
        }
        return http.build();
    }
}
